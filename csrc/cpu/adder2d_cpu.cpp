// adder2d on the CPU: adder2d_fprop_cpu and adder2d_dgrad_cpu of adder2d.h, float32.
//
// The output is cut into tiles of one image and one group. A thread copies the input that a tile reads into a small
// buffer: padding written out as zeros, rows and columns sorted by stride phase, so that tap (c, r, s) of output pixel
// f = p * pitch + q reads x_tile[f + offset[c, r, s]]. The kernel then needs neither bounds nor strides: it takes
// vectors along f, for several filters at once, straight over the ends of rows (the few results there are dropped).
// Each term is one subtraction, one bit operation and one addition, and nothing else limits it.
//
// The input gradient is computed by the same tiles: dy takes the place of x, the channels of x that of the filters, and
// the input pixels of one stride phase that of the output pixels (see class Dgrad). Its kernel has one operand more,
// the value of x at each output: a term is dy * clamp(w - x, -1, 1).
//
// Sections: kernel, instruction sets, tile, threads, operator.
#include "adder2d.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <initializer_list>
#include <memory>
#include <new>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

// What the entry points return; adder2d_cpu_error_string has the sentences.
enum Status : int32_t { kSuccess = 0, kInvalid = 1, kNoMemory = 2, kUnknownIsa = 3 };

// ---- kernel

constexpr int kFilters = 4;      // filters that a kernel takes at once: a vector of x is loaded once for all of them
constexpr int kMaxVectors = 8;   // most vectors along f that a kernel takes at once
constexpr int64_t kTaps = 128;   // terms summed one after the other; longer sums add such sums up, which rounds less
constexpr int64_t kBlockK = 32;  // filters summed side by side: their sums and kTaps weights each fit half of L1

// sums[k][f] += sum over t < taps of |x[f + offset[t]] - w[k][t]| for a block of filters k and pixels f, or
// sums[k][f] += sum over t < taps of x[f + offset[t]] * clamp(w[k][t] - own[k][f], -1, 1) for the input gradient.
struct KernelArgs {
  float const* x;
  int64_t const* offset;
  float const* w;
  int64_t w_stride;  // between filters
  int64_t taps;
  float* sums;
  float const* own;
  int64_t sums_stride;  // between filters, of own too
};

// acc += |x - w|
template <typename Float, typename Int>
inline __attribute__((always_inline)) void add_abs_diff(Float& acc, Float const& x, float w) {
#if defined(__aarch64__)
  acc += (Float)vabdq_f32((float32x4_t)x, vdupq_n_f32(w));
#else
  acc += (Float)((Int)(x - w) & 0x7fffffff);
#endif
}

// d = clamp(d, -1, 1), which keeps NaN. Compilers make two operations of a comparison and a choice, as neither minimum
// nor maximum has its NaN; that of x86 has, of its operands in this order.
template <int kLanes, typename Float>
inline __attribute__((always_inline)) void clamp_to_one(Float& d) {
  Float const one = Float{} + 1.f;
#if defined(__aarch64__)
  d = (Float)vminq_f32(vmaxq_f32((float32x4_t)d, (float32x4_t)-one), (float32x4_t)one);
#else
  if constexpr (kLanes == 4) {
    Float low = -one, high = one;
    asm("maxps %1, %0" : "+x"(low) : "x"(d));
    asm("minps %1, %0" : "+x"(high) : "x"(low));
    d = high;
  } else {
    asm("vmaxps %1, %2, %0" : "=v"(d) : "v"(d), "v"(-one));
    asm("vminps %1, %2, %0" : "=v"(d) : "v"(d), "v"(one));
  }
#endif
}

template <int kLanes, bool kDgrad, int kK, int kF>
inline __attribute__((always_inline)) void accumulate(KernelArgs const& a) {
  typedef float Float __attribute__((vector_size(4 * kLanes)));
  typedef int32_t Int __attribute__((vector_size(4 * kLanes)));
  Float acc[kK][kF] = {}, own[kK][kF];
  if constexpr (kDgrad) {
#pragma GCC unroll 4
    for (int k = 0; k < kK; ++k) {
#pragma GCC unroll 8
      for (int f = 0; f < kF; ++f) memcpy(&own[k][f], a.own + k * a.sums_stride + f * kLanes, sizeof(Float));
    }
  }
  for (int64_t t = 0; t < a.taps; ++t) {
    Float x_frag[kF];
#pragma GCC unroll 8
    for (int f = 0; f < kF; ++f) memcpy(&x_frag[f], a.x + a.offset[t] + f * kLanes, sizeof(Float));
#pragma GCC unroll 4
    for (int k = 0; k < kK; ++k) {
      float const w = a.w[k * a.w_stride + t];
#pragma GCC unroll 8
      for (int f = 0; f < kF; ++f) {
        if constexpr (kDgrad) {
          Float d = w - own[k][f];
          clamp_to_one<kLanes>(d);
          acc[k][f] += x_frag[f] * d;
        } else {
          add_abs_diff<Float, Int>(acc[k][f], x_frag[f], w);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < kK; ++k) {
#pragma GCC unroll 8
    for (int f = 0; f < kF; ++f) {
      float* const sums = a.sums + k * a.sums_stride + f * kLanes;
      Float sum;
      memcpy(&sum, sums, sizeof(sum));
      sum += acc[k][f];
      memcpy(sums, &sum, sizeof(sum));
    }
  }
}

// ---- instruction sets

// One function template per instruction set: the kernel is inlined into it and compiled with its target.
struct Baseline {  // SSE2 on x86-64, NEON on Arm
  static constexpr int kLanes = 4, kVectors = 2, kDgradVectors = 1;
  template <bool kDgrad, int kK, int kF>
  static void run(KernelArgs const& args) {
    accumulate<kLanes, kDgrad, kK, kF>(args);
  }
};

#if defined(__x86_64__)
struct Avx2 {
  static constexpr int kLanes = 8, kVectors = 2, kDgradVectors = 1;
  template <bool kDgrad, int kK, int kF>
  __attribute__((target("avx2,fma"))) static void run(KernelArgs const& args) {
    accumulate<kLanes, kDgrad, kK, kF>(args);
  }
};

struct Avx512 {
  static constexpr int kLanes = 16, kVectors = 4, kDgradVectors = 2;
  template <bool kDgrad, int kK, int kF>
  __attribute__((target("avx512f"))) static void run(KernelArgs const& args) {
    accumulate<kLanes, kDgrad, kK, kF>(args);
  }
};
#endif

struct Kernels {
  int vectors;  // that a kernel takes at once for kFilters filters, as the registers allow; kMaxVectors for one filter
  void (*one_filter[kMaxVectors])(KernelArgs const&);  // [vectors - 1]
  void (*filters[4])(KernelArgs const&);               // [vectors - 1], kFilters at once
};

struct Isa {
  int lanes;  // floats in a vector
  Kernels fprop, dgrad;
};

template <typename Target, bool kDgrad>
constexpr Kernels make_kernels() {
  return {kDgrad ? Target::kDgradVectors : Target::kVectors,
          {Target::template run<kDgrad, 1, 1>, Target::template run<kDgrad, 1, 2>, Target::template run<kDgrad, 1, 3>,
           Target::template run<kDgrad, 1, 4>, Target::template run<kDgrad, 1, 5>, Target::template run<kDgrad, 1, 6>,
           Target::template run<kDgrad, 1, 7>, Target::template run<kDgrad, 1, 8>},
          {Target::template run<kDgrad, kFilters, 1>, Target::template run<kDgrad, kFilters, 2>,
           Target::template run<kDgrad, kFilters, 3>, Target::template run<kDgrad, kFilters, 4>}};
}
template <typename Target>
constexpr Isa make_isa() {
  return {Target::kLanes, make_kernels<Target, false>(), make_kernels<Target, true>()};
}

constexpr char const* kIsaVariable = "TORCH2TRT_ADDER_CPU_ISA";

// The widest one of this CPU, or the one that kIsaVariable names (for tests); reports and returns null where the CPU
// does not have that one.
Isa const* select_isa() {
  struct Choice {
    char const* name;
    bool supported;
    Isa const* isa;
  };
  static constexpr Isa baseline = make_isa<Baseline>();
#if defined(__x86_64__)
  static constexpr Isa avx2 = make_isa<Avx2>(), avx512 = make_isa<Avx512>();
  Choice const choices[] = {{"avx512", __builtin_cpu_supports("avx512f") != 0, &avx512},
                            {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), &avx2},
                            {"baseline", true, &baseline}};
#else
  Choice const choices[] = {{"baseline", true, &baseline}};
#endif
  char const* const asked = getenv(kIsaVariable);
  bool const any = asked == nullptr || *asked == '\0';
  std::string names;
  for (Choice const& choice : choices) {
    if (!choice.supported) continue;
    if (any || strcmp(asked, choice.name) == 0) return choice.isa;
    names += (names.empty() ? "" : ", ") + std::string(choice.name);
  }
  fprintf(
      stderr,
      "torch2trt_adder: %s is \"%.32s\", but must be one of %s on this CPU: correct it, or unset it for the fastest\n",
      kIsaVariable, asked, names.c_str());
  return nullptr;
}

// ---- tile

// How one axis of the input lies in a tile buffer. Output o reads, for tap t, input o * stride - pad + t * dilation.
// Inputs of the same phase (position modulo stride) that neighbouring outputs read are neighbours in a segment; taps
// share a segment where what they read overlaps, so a large dilation copies no input that nobody reads.
struct Axis {
  struct Segment {
    int64_t begin;  // first input position, relative to the tile's first output * stride - pad
    int64_t lines;  // positions begin, begin + stride, ...
    int64_t start;  // lines of the segments before it
  };
  std::vector<Segment> segments;
  std::vector<int64_t> tap_segment, tap_line;  // tap t: output o reads line tap_line[t] + o
  int64_t lines = 0, longest = 0;              // of all segments together, of the longest one

  Axis(int64_t taps, int64_t dilation, int64_t stride, int64_t outputs) {
    // Taps of the same phase are `phases` apart. A tap can only join the last segment of its phase: it lies past the
    // others.
    int64_t const phases = std::min(stride / std::gcd(stride, dilation), taps);
    for (int64_t t = 0; t < taps; ++t) {
      int64_t const position = t * dilation;
      int64_t segment = t < phases ? -1 : tap_segment[t - phases];
      if (segment < 0 || (position - segments[segment].begin) / stride > segments[segment].lines) {
        segment = int64_t(segments.size());
        segments.push_back({position, 0, 0});
      }
      int64_t const line = (position - segments[segment].begin) / stride;
      segments[segment].lines = line + outputs;
      tap_segment.push_back(segment);
      tap_line.push_back(line);
    }
    for (Segment& s : segments) {
      s.start = lines;
      lines += s.lines;
      longest = std::max(longest, s.lines);
    }
  }
};

// The tile buffer [C / groups][column segments][rows][pitch], and the offsets of the taps in it.
struct Tile {
  int64_t outputs_h, outputs_w;
  Axis rows, columns;
  int64_t pitch, channel;  // floats between rows, between channels
  int64_t floats;

  Tile(Adder2dParams const& p, int64_t outputs_h, int64_t outputs_w)
      : outputs_h(outputs_h),
        outputs_w(outputs_w),
        rows(p.R, p.dil_h, p.stride_h, outputs_h),
        columns(p.S, p.dil_w, p.stride_w, outputs_w),
        pitch(columns.longest),
        channel(int64_t(columns.segments.size()) * rows.lines * pitch),
        floats(p.C / p.groups * channel) {}

  int64_t row(int64_t column_segment, int64_t line) const { return (column_segment * rows.lines + line) * pitch; }

  std::vector<int64_t> tap_offsets(Adder2dParams const& p) const {
    std::vector<int64_t> offsets;
    for (int64_t c = 0; c < p.C / p.groups; ++c)
      for (int64_t r = 0; r < p.R; ++r)
        for (int64_t s = 0; s < p.S; ++s)
          offsets.push_back(c * channel + columns.tap_line[s] +
                            row(columns.tap_segment[s], rows.segments[rows.tap_segment[r]].start + rows.tap_line[r]));
    return offsets;
  }

  // Copies what outputs from (p0, q0) on read of `x`, the first channel of image and group.
  void fill(float* buffer, Adder2dParams const& p, float const* x, int64_t p0, int64_t q0) const {
    constexpr int64_t kChannels = 16;  // taken together: in channels_last they share cache lines
    int64_t const channels = p.C / p.groups;
    for (int64_t c0 = 0; c0 < channels; c0 += kChannels)
      for (size_t column = 0; column < columns.segments.size(); ++column)
        for (Axis::Segment const& segment : rows.segments)
          for (int64_t line = 0; line < segment.lines; ++line) {
            int64_t const h = (p0 + line) * p.stride_h - p.pad_h + segment.begin;
            float* const to = buffer + row(column, segment.start + line);
            for (int64_t c = c0; c < std::min(c0 + kChannels, channels); ++c) {
              if (h < 0 || h >= p.H)
                std::fill_n(to + c * channel, pitch, 0.f);
              else
                fill_row(to + c * channel, p, x + c * p.x_stride[1] + h * p.x_stride[2],
                         q0 * p.stride_w - p.pad_w + columns.segments[column].begin, columns.segments[column].lines);
            }
          }
  }

 private:
  // One row: input positions w, w + stride_w, ..., zeros where there is no input and up to `pitch`.
  void fill_row(float* to, Adder2dParams const& p, float const* x, int64_t w, int64_t lines) const {
    int64_t const stride = p.stride_w;
    int64_t const begin = std::clamp<int64_t>(w < 0 ? (-w + stride - 1) / stride : 0, 0, lines);
    int64_t const end = std::clamp<int64_t>(w < p.W ? (p.W - w + stride - 1) / stride : 0, begin, lines);
    std::fill_n(to, begin, 0.f);
    int64_t const step = stride * p.x_stride[3];
    if (begin < end) {
      float const* const from = x + (w + begin * stride) * p.x_stride[3];
      if (step == 1)
        memcpy(to + begin, from, (end - begin) * sizeof(float));
      else
        for (int64_t i = begin; i < end; ++i) to[i] = from[(i - begin) * step];
    }
    std::fill_n(to + end, pitch - end, 0.f);
  }
};

// ---- threads

using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// OpenMP's way to start a parallel region, of the OpenMP library that torch has brought into the process: its threads
// are there and awake, while threads of our own would compete with them for the cores.
std::atomic<Parallel> openmp{nullptr};
std::atomic<bool> openmp_looked_up{false};

// A forked process must not use it: it has none of its parent's threads, and OpenMP would wait for them for ever. A
// fork after this library was loaded is seen by its handler, an earlier one by the kernel's mark on a process that was
// not executed since.
std::atomic<bool> forked{false};

bool started_by_fork() {
  constexpr unsigned long kForkNoExec = 0x40;  // PF_FORKNOEXEC of Linux
  FILE* const file = fopen("/proc/self/stat", "re");
  if (file == nullptr) return false;
  char stat[512] = {};
  size_t const size = fread(stat, 1, sizeof(stat) - 1, file);
  fclose(file);
  char const* const name_end = size > 0 ? strrchr(stat, ')') : nullptr;  // the name may hold anything
  unsigned long flags = 0;
  return name_end != nullptr && sscanf(name_end + 1, " %*c %*d %*d %*d %*d %*d %lu", &flags) == 1 &&
         (flags & kForkNoExec) != 0;
}

// On load, so that no fork after it goes unseen. Without the handler, threads of our own are always right.
__attribute__((constructor)) void watch_forks() {
  bool const watched = pthread_atfork(nullptr, nullptr, [] { forked = true; }) == 0;
  forked = !watched || started_by_fork();
}

// Null where the process has no OpenMP or must not use it.
Parallel process_openmp() {
  if (forked) return nullptr;
  if (!openmp_looked_up) {
    openmp = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    openmp_looked_up = true;
  }
  return openmp;
}

int64_t const max_threads = 4 * std::max(int64_t{std::thread::hardware_concurrency()}, int64_t{1});

// As many threads as were asked for and are of use. OpenMP ends the process where the system grants it too few.
int64_t usable_threads(int64_t threads) { return std::clamp<int64_t>(threads, 1, max_threads); }

// Calls body(item, slot) once for each item below `items`, on at most `threads` threads, the caller's among them. No
// two calls with the same slot, 0 <= slot < threads, run at once. `body` must not throw.
void run_on_threads(int64_t items, int64_t threads, std::function<void(int64_t item, int64_t slot)> const& body) {
  struct Job {
    std::function<void(int64_t, int64_t)> const& body;
    int64_t const items;
    std::atomic<int64_t> next_item, next_slot;
  } job{body, items, {0}, {0}};
  auto const work = [](void* data) {
    Job& job = *static_cast<Job*>(data);
    int64_t const slot = job.next_slot++;
    for (int64_t item; (item = job.next_item++) < job.items;) job.body(item, slot);
  };
  if (threads == 1) return work(&job);
  if (Parallel const parallel = process_openmp()) return parallel(work, &job, threads, 0);
  std::vector<std::thread> others;
  others.reserve(threads);
  try {
    while (int64_t(others.size()) < threads - 1) others.emplace_back(work, &job);
  } catch (std::exception const&) {
    // The system grants no more threads: those that there are do all the work.
  }
  work(&job);
  for (std::thread& other : others) other.join();
}

// ---- operator

constexpr int64_t kTileFloats = 48 << 10;     // floats of a tile buffer: within a thread's L2 cache, with the weights
constexpr int64_t kTermsPerThread = 1 << 18;  // fewer are done before another thread has woken up

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What is computed tile by tile: a forward pass, or one stride phase of an input gradient in the shape of one.
struct Problem {
  Adder2dParams p;
  float const* w;  // [K][C / groups][R][S]
  // The forward pass: what p.epilogue points to, if it does.
  Adder2dEpilogue epilogue = {};
  // The input gradient: x at the place of each output, and the whole of it with the phase, for what needs the rule
  // itself.
  float const* own = nullptr;
  int64_t own_stride[4] = {};
  Adder2dDgradParams const* dgrad = nullptr;
  int64_t phase_h = 0, phase_w = 0;
};

// dx of one element term by term.
float dgrad_by_rule(Adder2dDgradParams const& params, int64_t n, int64_t c, int64_t h, int64_t w) {
  Adder2dParams const& p = params.layer;
  int64_t const channels = p.C / p.groups, filters = p.K / p.groups, group = c / channels;
  float const x =
      static_cast<float const*>(p.x)[n * p.x_stride[0] + c * p.x_stride[1] + h * p.x_stride[2] + w * p.x_stride[3]];
  float sum = 0.f;
  for (int64_t r = 0, top = h + p.pad_h; r < p.R && top >= 0; ++r, top -= p.dil_h)
    for (int64_t s = 0, left = w + p.pad_w; s < p.S && left >= 0; ++s, left -= p.dil_w) {
      int64_t const row = top / p.stride_h, column = left / p.stride_w;
      if (top % p.stride_h != 0 || left % p.stride_w != 0 || row >= p.P || column >= p.Q) continue;
      float const* const dy =
          static_cast<float const*>(p.y) + n * p.y_stride[0] + row * p.y_stride[2] + column * p.y_stride[3];
      for (int64_t k = group * filters; k < (group + 1) * filters; ++k) {
        float const d = static_cast<float const*>(p.w)[((k * channels + c % channels) * p.R + r) * p.S + s] - x;
        sum += dy[k * p.y_stride[1]] * (d < -1.f ? -1.f : d > 1.f ? 1.f : d);
      }
    }
  return sum;
}

class Pass {
 public:
  Pass(Problem const& problem, Isa const& isa, int64_t threads)
      : problem_(problem),
        p_(problem.p),
        lanes_(isa.lanes),
        kernels_(problem.dgrad == nullptr ? isa.fprop : isa.dgrad),
        filters_(p_.K / p_.groups),
        crs_(int64_t(p_.C) / p_.groups * p_.R * p_.S),
        tile_(choose_tile(threads)) {
    offsets_ = tile_.tap_offsets(p_);
    workspace_floats_ = tile_.floats + slack() + 2 * kBlockK * kMaxVectors * lanes_;
    workspace_.reset(static_cast<float*>(malloc(threads_ * workspace_floats_ * sizeof(float))));
    if (workspace_ == nullptr) throw std::bad_alloc();
  }

  void run() {
    run_on_threads(items_, threads_,
                   [this](int64_t item, int64_t slot) { run_tile(item, workspace_.get() + slot * workspace_floats_); });
  }

 private:
  // Pixels f to f_end of the tile at (p0, q0), less those beyond the end of a row, for the filters from k on. Their
  // sums lie side by side, a filter's `stride` floats behind the one's before.
  struct Block {
    int64_t n, k, count, p0, q0, f, f_end, width, stride;
  };

  // The largest tile that fits the buffer, made smaller, or its filters split, until every thread has a few of them.
  Tile choose_tile(int64_t threads) {
    int64_t const outputs = int64_t(p_.N) * p_.K * p_.P * p_.Q;
    threads = std::clamp<int64_t>(outputs / divide_up(kTermsPerThread, crs_), 1, threads);
    int64_t h = p_.P, w = p_.Q;
    while (Tile(p_, h, w).floats > kTileFloats && h * w > lanes_) (h > 1 ? h : w) = divide_up(h > 1 ? h : w, 2);
    int64_t const wanted = threads > 1 ? 4 * threads : 1;
    auto const tiles = [&] { return int64_t(p_.N) * p_.groups * divide_up(p_.P, h) * divide_up(p_.Q, w); };
    int64_t const parts = std::min(divide_up(wanted, tiles()), divide_up(filters_, 2 * kBlockK));
    while (tiles() * parts < wanted && h > 1 && h * w > 4 * lanes_) h = divide_up(h, 2);
    h = divide_up(p_.P, divide_up(p_.P, h));  // of equal size
    w = divide_up(p_.Q, divide_up(p_.Q, w));
    part_ = divide_up(divide_up(filters_, parts), kFilters) * kFilters;
    parts_ = divide_up(filters_, part_);
    items_ = tiles() * parts_;
    threads_ = std::min(threads, items_);
    return Tile(p_, h, w);
  }

  int64_t slack() const { return kMaxVectors * lanes_; }  // floats that the last vectors may read behind the tile

  void run_tile(int64_t item, float* workspace) const {
    auto const take = [&item](int64_t count) {
      int64_t const i = item % count;
      item /= count;
      return i;
    };
    int64_t const k_begin = take(parts_) * part_;
    int64_t const q0 = take(divide_up(p_.Q, tile_.outputs_w)) * tile_.outputs_w;
    int64_t const p0 = take(divide_up(p_.P, tile_.outputs_h)) * tile_.outputs_h;
    int64_t const g = take(p_.groups), n = item;
    int64_t const k_end = std::min(k_begin + part_, filters_);

    float* const x_tile = workspace;
    float* const sums = workspace + tile_.floats + slack();
    float* const own = sums + kBlockK * kMaxVectors * lanes_;
    float const* const x = static_cast<float const*>(p_.x) + n * p_.x_stride[0];
    tile_.fill(x_tile, p_, x + g * (p_.C / p_.groups) * p_.x_stride[1], p0, q0);
    std::fill_n(x_tile + tile_.floats, slack(), 0.f);

    int64_t const height = std::min(tile_.outputs_h, p_.P - p0), width = std::min(tile_.outputs_w, p_.Q - q0);
    int64_t const pixels = (height - 1) * tile_.pitch + width;
    int64_t const all_vectors = divide_up(pixels, lanes_);
    int64_t const most_vectors = k_end - k_begin < kFilters ? kMaxVectors : kernels_.vectors;
    int64_t const blocks = divide_up(all_vectors, most_vectors);
    for (int64_t block = 0; block < blocks; ++block) {
      int64_t const vector = all_vectors * block / blocks;
      int64_t const vectors = all_vectors * (block + 1) / blocks - vector;
      int64_t const f = vector * lanes_, stride = vectors * lanes_;
      for (int64_t k = k_begin; k < k_end; k += kBlockK) {
        Block const at{
            n, g * filters_ + k, std::min(kBlockK, k_end - k), p0, q0, f, std::min(f + stride, pixels), width, stride};
        if (problem_.dgrad != nullptr) load_own(at, own);
        sum_block(x_tile + f, at, vectors, own, sums);
        if (p_.epilogue != nullptr) apply_epilogue(at, sums);
        store_block(at, sums);
      }
    }
  }

  void sum_block(float const* x, Block const& at, int64_t vectors, float const* own, float* sums) const {
    float const* const w = problem_.w + at.k * crs_;
    std::fill_n(sums, at.count * at.stride, 0.f);
    for (int64_t t = 0; t < crs_; t += kTaps) {
      KernelArgs args{x, offsets_.data() + t, w + t, crs_, std::min(kTaps, crs_ - t), sums, own, at.stride};
      int64_t i = 0;
      auto const advance = [&](int64_t filters) {
        i += filters;
        args.w += filters * crs_;
        args.sums += filters * at.stride;
        args.own += filters * at.stride;
      };
      for (; i + kFilters <= at.count; advance(kFilters)) kernels_.filters[vectors - 1](args);
      for (; i < at.count; advance(1)) kernels_.one_filter[vectors - 1](args);
    }
  }

  // Calls visit(element, its place among the sums, filter, p, q) for the block's elements of a tensor in the output's
  // shape.
  template <typename Element, typename Visit>
  void visit_block(Block const& at, Element* tensor, int64_t const* stride, Visit const& visit) const {
    tensor += at.n * stride[0] + at.k * stride[1];
    for (int64_t f = at.f; f < at.f_end;) {
      int64_t const p = at.p0 + f / tile_.pitch, column = f % tile_.pitch, q = at.q0 + column;
      int64_t const pixels = std::min(tile_.pitch - column, at.f_end - f), kept = std::min(at.width - column, pixels);
      Element* const row = tensor + p * stride[2] + q * stride[3];
      int64_t const place = f - at.f;
      auto const visit_one = [&](int64_t i, int64_t j) {
        visit(row[i * stride[1] + j * stride[3]], i * at.stride + place + j, at.k + i, p, q + j);
      };
      if (stride[1] == 1) {  // channels_last
        for (int64_t j = 0; j < kept; ++j)
          for (int64_t i = 0; i < at.count; ++i) visit_one(i, j);
      } else {
        for (int64_t i = 0; i < at.count; ++i)
          for (int64_t j = 0; j < kept; ++j) visit_one(i, j);
      }
      f += pixels;
    }
  }

  void load_own(Block const& at, float* own) const {
    std::fill_n(own, at.count * at.stride, 0.f);
    visit_block(at, problem_.own, problem_.own_stride,
                [own](float const& x, int64_t place, int64_t, int64_t, int64_t) { own[place] = x; });
  }

  // Makes outputs of sums: scale * (b - sum) + shift + residual, between the limits. A NaN stays a NaN.
  void apply_epilogue(Block const& at, float* sums) const {
    Adder2dEpilogue const& e = problem_.epilogue;
    auto const of_filter = [](void const* values, int64_t k, float missing) {
      return values == nullptr ? missing : static_cast<float const*>(values)[k];
    };
    for (int64_t i = 0; i < at.count; ++i) {
      float const bias = of_filter(p_.b, at.k + i, 0.f), scale = of_filter(e.scale, at.k + i, 1.f),
                  shift = of_filter(e.shift, at.k + i, -0.f);  // x + -0 is x, with its sign of zero
      float* const of_i = sums + i * at.stride;
      for (int64_t j = 0; j < at.stride; ++j) of_i[j] = scale * (bias - of_i[j]) + shift;
    }
    if (e.residual != nullptr)
      visit_block(at, static_cast<float const*>(e.residual), e.residual_stride,
                  [sums](float const& residual, int64_t place, int64_t, int64_t, int64_t) { sums[place] += residual; });
    for (int64_t j = 0; j < at.count * at.stride; ++j) {
      float const y = sums[j] < e.lower ? e.lower : sums[j];
      sums[j] = y > e.upper ? e.upper : y;
    }
  }

  void store_block(Block const& at, float const* sums) const {
    auto* const y = static_cast<float*>(p_.y);
    if (p_.epilogue != nullptr) {
      visit_block(at, y, p_.y_stride, [sums](float& y, int64_t place, int64_t, int64_t, int64_t) { y = sums[place]; });
    } else if (problem_.dgrad == nullptr) {
      auto const* const b = static_cast<float const*>(p_.b);
      visit_block(at, y, p_.y_stride, [=](float& y, int64_t place, int64_t k, int64_t, int64_t) {
        y = (b == nullptr ? 0.f : b[k]) - sums[place];
      });
    } else {
      visit_block(at, y, p_.y_stride, [&](float& dx, int64_t place, int64_t c, int64_t i, int64_t j) {
        dx = sums[place];
        if (dx != dx && !inside(i, j)) {  // a NaN may have met the zeros around dy, which the rule does not know
          Problem const& a = problem_;
          dx = dgrad_by_rule(*a.dgrad, at.n, c, a.phase_h + i * a.dgrad->layer.stride_h,
                             a.phase_w + j * a.dgrad->layer.stride_w);
        }
      });
    }
  }

  // Whether all taps of output (p, q) lie in the input.
  bool inside(int64_t p, int64_t q) const {
    int64_t const h = p * p_.stride_h - p_.pad_h, w = q * p_.stride_w - p_.pad_w;
    return h >= 0 && h + (p_.R - 1) * int64_t(p_.dil_h) < p_.H && w >= 0 && w + (p_.S - 1) * int64_t(p_.dil_w) < p_.W;
  }

  struct Free {
    void operator()(float* pointer) const { free(pointer); }
  };

  Problem const& problem_;
  Adder2dParams const& p_;
  int64_t lanes_;
  Kernels const& kernels_;
  int64_t filters_, crs_;  // filters of a group, terms of a sum
  int64_t part_, parts_;   // filters of an item, items a tile
  int64_t items_, threads_;
  Tile tile_;
  std::vector<int64_t> offsets_;  // [C / groups][R][S]
  int64_t workspace_floats_;      // of one thread: tile buffer, sums, x of an input gradient
  std::unique_ptr<float, Free> workspace_;
};

// A layer on 1x1 maps, as at the end of a network, would leave most lanes empty: its batch takes the place of a row.
void take_batch_as_row(Problem& problem) {
  Adder2dParams& p = problem.p;
  if (p.H == 1 && p.W == 1 && p.R == 1 && p.S == 1 && p.P == 1 && p.Q == 1 && p.pad_h == 0 && p.pad_w == 0) {
    std::swap(p.N, p.W);
    p.Q = p.W;
    p.stride_w = 1;
    std::swap(p.x_stride[0], p.x_stride[3]);
    std::swap(p.y_stride[0], p.y_stride[3]);
    std::swap(problem.own_stride[0], problem.own_stride[3]);
    std::swap(problem.epilogue.residual_stride[0], problem.epilogue.residual_stride[3]);
  }
}

// One axis of an input gradient, written for the rows. Rows of x that are stride apart, a phase, are read by every
// step-th tap, and through each of these by rows of dy side by side: i of the phase through tap first + m * step from
// start + i - m * lag. Backwards, these taps are those of a layer of stride 1 and dilation lag that reads dy.
struct Phase {
  int64_t phase, size;  // first row, number of rows
  int64_t first, step, taps;
  int32_t lag, pad;  // of the layer that reads dy

  // The phase that tap `first` reads, for first below min(taps, step).
  Phase(int64_t first, int64_t rows, int64_t all_taps, int64_t stride, int64_t pad_before, int64_t dilation)
      : first(first) {
    int64_t const common = std::gcd(stride, dilation);
    step = stride / common;
    lag = int32_t(dilation / common);
    taps = divide_up(all_taps - first, step);
    int64_t const position = first * dilation - pad_before;
    phase = (position % stride + stride) % stride;
    size = rows > phase ? divide_up(rows - phase, stride) : 0;
    pad = int32_t((taps - 1) * lag - (phase - position) / stride);
  }
};

class Dgrad {
 public:
  Dgrad(Adder2dDgradParams const& params, Isa const& isa, int64_t threads)
      : params_(params), p_(params.layer), isa_(isa), threads_(threads) {}

  void run() {
    int32_t const phases_h = std::min(p_.R, p_.stride_h / std::gcd(p_.stride_h, p_.dil_h));
    int32_t const phases_w = std::min(p_.S, p_.stride_w / std::gcd(p_.stride_w, p_.dil_w));
    if (phases_h < p_.stride_h || phases_w < p_.stride_w) clear();  // no tap reads the other phases
    for (int32_t r = 0; r < phases_h; ++r)
      for (int32_t s = 0; s < phases_w; ++s)
        run_phase(Phase(r, p_.H, p_.R, p_.stride_h, p_.pad_h, p_.dil_h),
                  Phase(s, p_.W, p_.S, p_.stride_w, p_.pad_w, p_.dil_w));
  }

 private:
  void clear() const {
    int64_t const* const stride = params_.dx_stride;
    for (int64_t n = 0; n < p_.N; ++n)
      for (int64_t c = 0; c < p_.C; ++c)
        for (int64_t h = 0; h < p_.H; ++h)
          for (int64_t w = 0; w < p_.W; ++w)
            static_cast<float*>(params_.dx)[n * stride[0] + c * stride[1] + h * stride[2] + w * stride[3]] = 0.f;
  }

  void run_phase(Phase const& h, Phase const& w) const {
    if (h.size == 0 || w.size == 0) return;
    std::vector<float> const weights = pack(h, w);
    Problem problem{p_, weights.data()};
    Adder2dParams& p = problem.p;
    std::swap(p.C, p.K);
    p.H = p_.P, p.W = p_.Q, p.P = int32_t(h.size), p.Q = int32_t(w.size), p.R = int32_t(h.taps), p.S = int32_t(w.taps);
    p.stride_h = p.stride_w = 1;
    p.dil_h = h.lag, p.dil_w = w.lag, p.pad_h = h.pad, p.pad_w = w.pad;
    auto const strides = [&](int64_t const* from, int64_t* to) {
      to[0] = from[0], to[1] = from[1], to[2] = from[2] * p_.stride_h, to[3] = from[3] * p_.stride_w;
      return h.phase * from[2] + w.phase * from[3];
    };
    p.x = p_.y;
    std::copy_n(p_.y_stride, 4, p.x_stride);
    p.y = static_cast<float*>(params_.dx) + strides(params_.dx_stride, p.y_stride);
    problem.own = static_cast<float const*>(p_.x) + strides(p_.x_stride, problem.own_stride);
    problem.dgrad = &params_;
    problem.phase_h = h.phase;
    problem.phase_w = w.phase;
    take_batch_as_row(problem);
    Pass(problem, isa_, threads_).run();
  }

  // The weights of the phase's taps, last tap first: [C][K / groups][taps][taps].
  std::vector<float> pack(Phase const& h, Phase const& w) const {
    int64_t const channels = p_.C / p_.groups, filters = p_.K / p_.groups;
    std::vector<float> packed(p_.C * filters * h.taps * w.taps);
    int64_t const threads = std::clamp<int64_t>(packed.size() / kTermsPerThread, 1, threads_);
    run_on_threads(p_.C, threads, [&](int64_t c, int64_t) {
      float* to = packed.data() + c * filters * h.taps * w.taps;
      for (int64_t k = c / channels * filters; k < (c / channels + 1) * filters; ++k) {
        float const* const from = static_cast<float const*>(p_.w) + (k * channels + c % channels) * p_.R * p_.S;
        for (int64_t r = h.taps - 1; r >= 0; --r)
          for (int64_t s = w.taps - 1; s >= 0; --s) *to++ = from[(h.first + r * h.step) * p_.S + w.first + s * w.step];
      }
    });
    return packed;
  }

  Adder2dDgradParams const& params_;
  Adder2dParams const& p_;
  Isa const& isa_;
  int64_t threads_;
};

// Runs `compute` with the instruction set of this CPU, unless the batch is empty.
template <typename Compute>
int32_t guarded(int64_t images, Compute const& compute) {
  static std::atomic<Isa const*> selected{nullptr};  // without a lock, which a fork might leave locked
  Isa const* isa = selected;
  if (isa == nullptr) selected = isa = select_isa();
  if (isa == nullptr) return kUnknownIsa;
  if (images == 0) return kSuccess;
  try {
    compute(*isa);
    return kSuccess;
  } catch (std::exception const&) {  // bad_alloc, or the length_error of a vector larger than any memory
    return kNoMemory;
  }
}

bool all_float32(std::initializer_list<int32_t> types) {
  return std::all_of(types.begin(), types.end(), [](int32_t type) { return type == ADDER2D_FLOAT32; });
}

// Pointers of an empty batch are not looked at.
bool all_there(int32_t images, std::initializer_list<void const*> pointers) {
  return images == 0 || std::find(pointers.begin(), pointers.end(), nullptr) == pointers.end();
}

}  // namespace

int32_t adder2d_fprop_cpu(Adder2dParams const* params, int32_t threads) {
  if (adder2d_check(params) != nullptr) return kInvalid;
  Adder2dParams const& p = *params;
  if (!all_float32({p.x_type, p.w_type, p.y_type}) || !all_there(p.N, {p.x, p.w, p.y})) return kInvalid;
  bool const has_residual = p.epilogue != nullptr && p.epilogue->residual != nullptr;
  if (has_residual && p.epilogue->residual_type != ADDER2D_FLOAT32) return kInvalid;
  return guarded(p.N, [&](Isa const& isa) {
    Problem problem{p, static_cast<float const*>(p.w)};
    if (p.epilogue != nullptr) problem.epilogue = *p.epilogue;
    take_batch_as_row(problem);
    Pass(problem, isa, usable_threads(threads)).run();
  });
}

int32_t adder2d_dgrad_cpu(Adder2dDgradParams const* params, int32_t threads) {
  if (adder2d_dgrad_check(params) != nullptr) return kInvalid;
  Adder2dParams const& p = params->layer;
  if (!all_float32({p.x_type, p.w_type, p.y_type, params->dx_type}) || !all_there(p.N, {p.x, p.w, p.y, params->dx}))
    return kInvalid;
  return guarded(p.N, [&](Isa const& isa) { Dgrad(*params, isa, usable_threads(threads)).run(); });
}

char const* adder2d_cpu_error_string(int32_t error) {
  switch (error) {
    case kSuccess: return "no error";
    case kInvalid: return "the params are not valid, not float32, or have a null pointer";
    case kNoMemory: return "there is not enough memory for the tiles of the layer: free some, or use fewer threads";
    case kUnknownIsa:
      return "TORCH2TRT_ADDER_CPU_ISA names an instruction set that this CPU does not have: correct it or unset it";
    default: return "unknown error";
  }
}
