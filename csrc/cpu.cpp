// adder2d on the CPU: adder2d_fprop_cpu of adder2d.h, float32.
//
// The output is cut into tiles of one image and one group. A thread copies the input that a tile reads into a small
// buffer: padding written out as zeros, rows and columns sorted by stride phase, so that tap (c, r, s) of output pixel
// f = p * pitch + q reads x_tile[f + offset[c, r, s]]. The kernel then needs neither bounds nor strides: it takes
// vectors along f, for several filters at once, straight over the ends of rows (the few results there are dropped).
// Each term is one subtraction, one bit operation and one addition, and nothing else limits it.
//
// Sections: kernel, instruction sets, tile, threads, operator.
#include "adder2d.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

// ---- kernel

constexpr int kFilters = 4;      // filters that a kernel takes at once: a vector of x is loaded once for all of them
constexpr int kMaxVectors = 8;   // most vectors along f that a kernel takes at once
constexpr int64_t kTaps = 128;   // terms summed one after the other; longer sums add such sums up, which rounds less
constexpr int64_t kBlockK = 32;  // filters summed side by side: their sums and kTaps weights each fit half of L1

// sums[k][f] += sum over t < taps of |x[f + offset[t]] - w[k][t]| for a block of filters k and pixels f.
struct KernelArgs {
  float const* x;
  int64_t const* offset;
  float const* w;
  int64_t w_stride;  // between filters
  int64_t taps;
  float* sums;
  int64_t sums_stride;  // between filters
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

template <int kLanes, int kK, int kF>
inline __attribute__((always_inline)) void accumulate(KernelArgs const& a) {
  typedef float Float __attribute__((vector_size(4 * kLanes)));
  typedef int32_t Int __attribute__((vector_size(4 * kLanes)));
  Float acc[kK][kF] = {};
  for (int64_t t = 0; t < a.taps; ++t) {
    Float x_frag[kF];
#pragma GCC unroll 8
    for (int f = 0; f < kF; ++f) memcpy(&x_frag[f], a.x + a.offset[t] + f * kLanes, sizeof(Float));
#pragma GCC unroll 4
    for (int k = 0; k < kK; ++k) {
      float const w = a.w[k * a.w_stride + t];
#pragma GCC unroll 8
      for (int f = 0; f < kF; ++f) add_abs_diff<Float, Int>(acc[k][f], x_frag[f], w);
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
  static constexpr int kLanes = 4, kVectors = 2;
  template <int kK, int kF>
  static void run(KernelArgs const& args) { accumulate<kLanes, kK, kF>(args); }
};

#if defined(__x86_64__)
struct Avx2 {
  static constexpr int kLanes = 8, kVectors = 2;
  template <int kK, int kF>
  __attribute__((target("avx2"))) static void run(KernelArgs const& args) { accumulate<kLanes, kK, kF>(args); }
};

struct Avx512 {
  static constexpr int kLanes = 16, kVectors = 4;
  template <int kK, int kF>
  __attribute__((target("avx512f"))) static void run(KernelArgs const& args) { accumulate<kLanes, kK, kF>(args); }
};
#endif

struct Isa {
  int lanes;    // floats in a vector
  int vectors;  // that a kernel takes at once for kFilters filters, as the registers allow; kMaxVectors for one filter
  void (*one_filter[kMaxVectors])(KernelArgs const&);  // [vectors - 1]
  void (*filters[4])(KernelArgs const&);               // [vectors - 1], kFilters at once
};

template <typename Target>
constexpr Isa make_isa() {
  return {Target::kLanes,
          Target::kVectors,
          {Target::template run<1, 1>, Target::template run<1, 2>, Target::template run<1, 3>,
           Target::template run<1, 4>, Target::template run<1, 5>, Target::template run<1, 6>,
           Target::template run<1, 7>, Target::template run<1, 8>},
          {Target::template run<kFilters, 1>, Target::template run<kFilters, 2>, Target::template run<kFilters, 3>,
           Target::template run<kFilters, 4>}};
}

// The widest one of this CPU, or the one that TORCH2TRT_ADDER_CPU_ISA names (for tests); null where it names none.
Isa const* select_isa() {
  char const* const name = getenv("TORCH2TRT_ADDER_CPU_ISA");
  auto const allowed = [name](char const* isa) { return name == nullptr || strcmp(name, isa) == 0; };
#if defined(__x86_64__)
  static constexpr Isa avx2 = make_isa<Avx2>(), avx512 = make_isa<Avx512>();
  if (allowed("avx512") && __builtin_cpu_supports("avx512f")) return &avx512;
  if (allowed("avx2") && __builtin_cpu_supports("avx2")) return &avx2;
#endif
  static constexpr Isa baseline = make_isa<Baseline>();
  return allowed("baseline") ? &baseline : nullptr;
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
    for (int64_t t = 0; t < taps; ++t) {
      int64_t const position = t * dilation;
      auto const joins = [=](Segment const& s) {
        return (position - s.begin) % stride == 0 && (position - s.begin) / stride <= s.lines;
      };
      auto segment = std::find_if(segments.begin(), segments.end(), joins);
      if (segment == segments.end()) segment = segments.insert(segment, {position, 0, 0});
      int64_t const line = (position - segment->begin) / stride;
      segment->lines = line + outputs;
      tap_segment.push_back(segment - segments.begin());
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
      float const* const from = x + w * p.x_stride[3];
      if (step == 1)
        memcpy(to + begin, from + begin, (end - begin) * sizeof(float));
      else
        for (int64_t i = begin; i < end; ++i) to[i] = from[i * step];
    }
    std::fill_n(to + end, pitch - end, 0.f);
  }
};

// ---- threads

using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// OpenMP's way to start a parallel region, of the OpenMP library that torch has brought into the process: its threads are
// there and awake, while threads of our own would compete with them for the cores. Null where there is none, and in a
// forked child, which has none of its parent's threads: OpenMP would wait for them for ever.
Parallel process_openmp() {
  static std::atomic<bool> forked{false};
  static int const registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
  static Parallel const parallel = registered == 0 ? (Parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel") : nullptr;
  return forked ? nullptr : parallel;
}

// Calls body(item, slot) once for each item below `items`, on at most `threads` threads, the caller's among them. No two
// calls with the same slot, 0 <= slot < threads, run at once. `body` must not throw.
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

class Fprop {
 public:
  Fprop(Adder2dParams const& p, Isa const& isa, int64_t threads)
      : p_(p),
        isa_(isa),
        filters_(p.K / p.groups),
        crs_(int64_t(p.C) / p.groups * p.R * p.S),
        tile_(choose_tile(threads)) {
    offsets_ = tile_.tap_offsets(p);
    workspace_floats_ = tile_.floats + slack() + kBlockK * kMaxVectors * isa_.lanes;
    workspace_.reset(static_cast<float*>(malloc(threads_ * workspace_floats_ * sizeof(float))));
    if (workspace_ == nullptr) throw std::bad_alloc();
  }

  void run() {
    run_on_threads(items_, threads_, [this](int64_t item, int64_t slot) {
      run_tile(item, workspace_.get() + slot * workspace_floats_);
    });
  }

 private:
  // The largest tile that fits the buffer, made smaller, or its filters split, until every thread has a few of them.
  Tile choose_tile(int64_t threads) {
    int64_t const outputs = int64_t(p_.N) * p_.K * p_.P * p_.Q;
    threads = std::clamp<int64_t>(outputs / divide_up(kTermsPerThread, crs_), 1, threads);
    int64_t h = p_.P, w = p_.Q;
    while (Tile(p_, h, w).floats > kTileFloats && h * w > isa_.lanes)
      (h > 1 ? h : w) = divide_up(h > 1 ? h : w, 2);
    int64_t const wanted = threads > 1 ? 4 * threads : 1;
    auto const tiles = [&] { return int64_t(p_.N) * p_.groups * divide_up(p_.P, h) * divide_up(p_.Q, w); };
    int64_t const parts = std::min(divide_up(wanted, tiles()), divide_up(filters_, 2 * kBlockK));
    while (tiles() * parts < wanted && h > 1 && h * w > 4 * isa_.lanes) h = divide_up(h, 2);
    h = divide_up(p_.P, divide_up(p_.P, h));  // of equal size
    w = divide_up(p_.Q, divide_up(p_.Q, w));
    part_ = divide_up(divide_up(filters_, parts), kFilters) * kFilters;
    parts_ = divide_up(filters_, part_);
    items_ = tiles() * parts_;
    threads_ = std::min(threads, items_);
    return Tile(p_, h, w);
  }

  int64_t slack() const { return kMaxVectors * isa_.lanes; }  // floats that the last vectors may read behind the tile

  void run_tile(int64_t item, float* workspace) const {
    auto const take = [&item](int64_t count) { int64_t const i = item % count; item /= count; return i; };
    int64_t const k_begin = take(parts_) * part_;
    int64_t const q0 = take(divide_up(p_.Q, tile_.outputs_w)) * tile_.outputs_w;
    int64_t const p0 = take(divide_up(p_.P, tile_.outputs_h)) * tile_.outputs_h;
    int64_t const g = take(p_.groups), n = item;
    int64_t const k_end = std::min(k_begin + part_, filters_);

    float* const x_tile = workspace;
    float* const sums = workspace + tile_.floats + slack();
    float const* const x = static_cast<float const*>(p_.x) + n * p_.x_stride[0];
    tile_.fill(x_tile, p_, x + g * (p_.C / p_.groups) * p_.x_stride[1], p0, q0);
    std::fill_n(x_tile + tile_.floats, slack(), 0.f);

    int64_t const height = std::min(tile_.outputs_h, p_.P - p0), width = std::min(tile_.outputs_w, p_.Q - q0);
    int64_t const pixels = (height - 1) * tile_.pitch + width;
    int64_t const all_vectors = divide_up(pixels, isa_.lanes);
    int64_t const most_vectors = k_end - k_begin < kFilters ? kMaxVectors : isa_.vectors;
    int64_t const blocks = divide_up(all_vectors, most_vectors);
    for (int64_t block = 0; block < blocks; ++block) {
      int64_t const vector = all_vectors * block / blocks;
      int64_t const vectors = all_vectors * (block + 1) / blocks - vector;
      int64_t const f = vector * isa_.lanes;
      for (int64_t k = k_begin; k < k_end; k += kBlockK) {
        int64_t const count = std::min(kBlockK, k_end - k);
        sum_block(x_tile + f, g * filters_ + k, count, vectors, sums);
        store_block(sums, vectors * isa_.lanes, n, g * filters_ + k, count, p0, q0, f,
                    std::min(f + vectors * isa_.lanes, pixels), width);
      }
    }
  }

  // sums[count][vectors * lanes] for the filters from k on and the pixels from `x` on.
  void sum_block(float const* x, int64_t k, int64_t count, int64_t vectors, float* sums) const {
    int64_t const stride = vectors * isa_.lanes;
    float const* const w = static_cast<float const*>(p_.w) + k * crs_;
    std::fill_n(sums, count * stride, 0.f);
    for (int64_t t = 0; t < crs_; t += kTaps) {
      KernelArgs args{x, offsets_.data() + t, w + t, crs_, std::min(kTaps, crs_ - t), sums, stride};
      int64_t i = 0;
      for (; i + kFilters <= count; i += kFilters) {
        isa_.filters[vectors - 1](args);
        args.w += kFilters * crs_;
        args.sums += kFilters * stride;
      }
      for (; i < count; ++i) {
        isa_.one_filter[vectors - 1](args);
        args.w += crs_;
        args.sums += stride;
      }
    }
  }

  // y = b - sums for the pixels f to f_end of the tile at (p0, q0), less those beyond the end of a row.
  void store_block(float const* sums, int64_t stride, int64_t n, int64_t k, int64_t count, int64_t p0, int64_t q0,
                   int64_t f, int64_t f_end, int64_t width) const {
    float const* const b = p_.b == nullptr ? nullptr : static_cast<float const*>(p_.b) + k;
    float* const y = static_cast<float*>(p_.y) + n * p_.y_stride[0] + k * p_.y_stride[1];
    while (f < f_end) {
      int64_t const row = f / tile_.pitch, q = f % tile_.pitch;
      int64_t const pixels = std::min(tile_.pitch - q, f_end - f), kept = std::min(width - q, pixels);
      float* const to = y + (p0 + row) * p_.y_stride[2] + (q0 + q) * p_.y_stride[3];
      auto const store = [&](int64_t i, int64_t j) {
        to[i * p_.y_stride[1] + j * p_.y_stride[3]] = (b == nullptr ? 0.f : b[i]) - sums[i * stride + j];
      };
      if (p_.y_stride[1] == 1) {  // channels_last
        for (int64_t j = 0; j < kept; ++j)
          for (int64_t i = 0; i < count; ++i) store(i, j);
      } else {
        for (int64_t i = 0; i < count; ++i)
          for (int64_t j = 0; j < kept; ++j) store(i, j);
      }
      f += pixels;
      sums += pixels;
    }
  }

  struct Free {
    void operator()(float* pointer) const { free(pointer); }
  };

  Adder2dParams const& p_;
  Isa const& isa_;
  int64_t filters_, crs_;           // filters of a group, terms of a sum
  int64_t part_, parts_;            // filters of an item, items a tile
  int64_t items_, threads_;
  Tile tile_;
  std::vector<int64_t> offsets_;    // [C / groups][R][S]
  int64_t workspace_floats_;        // of one thread: tile buffer, sums
  std::unique_ptr<float, Free> workspace_;
};

// A layer on 1x1 maps, as at the end of a network, would leave most lanes empty: its batch takes the place of a row.
Adder2dParams batch_as_row(Adder2dParams p) {
  if (p.H == 1 && p.W == 1 && p.R == 1 && p.S == 1 && p.P == 1 && p.Q == 1 && p.pad_h == 0 && p.pad_w == 0) {
    std::swap(p.N, p.W);
    p.Q = p.W;
    p.stride_w = 1;
    std::swap(p.x_stride[0], p.x_stride[3]);
    std::swap(p.y_stride[0], p.y_stride[3]);
  }
  return p;
}

}  // namespace

int32_t adder2d_fprop_cpu(Adder2dParams const* params, int32_t threads) {
  if (adder2d_check(params) != nullptr) return 1;
  for (int32_t const type : {params->x_type, params->w_type, params->y_type})
    if (type != ADDER2D_FLOAT32) return 1;
  static Isa const* const isa = select_isa();
  if (isa == nullptr) return 3;
  if (params->N == 0) return 0;
  try {
    Adder2dParams const p = batch_as_row(*params);
    Fprop(p, *isa, std::max(threads, 1)).run();
    return 0;
  } catch (std::exception const&) {
    return 2;
  }
}
