// 3 x 3 kernels at stride 1 on float32 arithmetic: windows that slide along rows of the output.
//
// A block owns kTileK filters by kTilePQ output pixels, and steps through the channels, kTileC at a time. Of these,
// shared memory holds the rows of the image that the tile's windows touch, once and not once for each tap as in
// fprop_simt.cu. A thread has runs of kRun pixels side by side in a row of the output: it reads kRun + 2 pixels of the
// image and adds up three taps of them. So fewer instructions copy and read, and more of them add. Neither weights nor
// image are packed.
#include <algorithm>
#include <numeric>

#include "common/cp_async.cuh"
#include "common/device.h"
#include "common/launch.cuh"
#include "fprop/fprop.h"
#include "tile/arch.h"
#include "tile/split_k.cuh"

namespace adder2d {
namespace {

// ---- traits

constexpr int32_t kR = 3, kS = 3;
constexpr int32_t kStages = 2;                            // slices in flight
constexpr int32_t kTileC = 8, kTerms = kTileC * kR * kS;  // channels and terms of a slice
constexpr int32_t kAbsent = INT32_MIN;
constexpr int32_t kMaxPatch = 1024;  // elements of a channel of the image in shared memory

template <int kTileK_, int kTilePQ_, int kRun_, int kThreadK_, int kThreadPQ_, int kLanesK_, int kParts_, int kBlocks>
struct Tile {
  static constexpr int kTileK = kTileK_, kTilePQ = kTilePQ_;  // outputs of a block: filters, pixels
  static constexpr int kRun = kRun_, kWindow = kRun + kS - 1;
  // Outputs of a thread: filters in groups of 4, runs of pixels.
  static constexpr int kThreadK = kThreadK_, kThreadPQ = kThreadPQ_;
  static constexpr int kGroupsK = kThreadK / 4, kRuns = kThreadPQ / kRun;
  static constexpr int kParts = kParts_;  // parts of the block that share out a slice's channels
  static constexpr int kPartThreads = kTileK / kThreadK * (kTilePQ / kThreadPQ), kThreads = kParts * kPartThreads;
  static constexpr int kLanesK = kLanesK_, kLanesPQ = 32 / kLanesK;  // a warp's threads
  static constexpr int kWarpsK = kTileK / (kLanesK * kThreadK);
  static constexpr int kBlocksPerSM = kBlocks;
  static constexpr int kRowsK = kThreads / 8;  // filters copied at once: 8 threads side by side along the reduction
  static constexpr int kPartC = kTileC / kParts;
  static constexpr int kPitchK = kTileK + 4;  // 8 threads that store 8 terms of a filter find different banks

  static_assert(kTileK % (kLanesK * kThreadK) == 0 && kTilePQ % (kLanesPQ * kThreadPQ) == 0,
                "warps must tile the block");
  static_assert(kThreadK % 4 == 0 && kThreadPQ % kRun == 0, "threads hold groups of filters and runs of pixels");
  static_assert((kTileK % kRowsK == 0 || kRowsK % kTileK == 0) && kTerms % 8 == 0, "8 lanes copy along the reduction");
  static_assert(kTileC == 8 && kThreads % 8 == 0, "8 lanes copy the channels of a pixel");
};

// The problem, and the image's rows in shared memory. Rows are counted over the batch as if each image had its padding
// around it: output row p of image n has its windows in rows n * rows .. n * rows + 2 from p on.
struct WindowArgs : FpropArgs {
  int32_t rows;       // of an image with its padding
  int32_t row_pitch;  // elements of a row in shared memory
  int32_t patch;      // elements of a channel in shared memory, all rows of a tile
  FastDiv div_rows, div_row_pitch;
  bool channels;  // channels lie side by side in x
};

// Weights, then image.
__host__ __device__ constexpr int32_t stage_floats(int32_t tile_k, int32_t patch) {
  return kTerms * (tile_k + 4) + kTileC * patch;
}
// The stages, and a table no longer than a channel.
constexpr size_t smem_size(int32_t tile_k, int32_t patch) {
  return sizeof(float) * (kStages * stage_floats(tile_k, patch) + patch);
}

// The tile's place in the output, and a thread's in the tile. Sums are written four side by side.
template <class T>
using OutputTile = EpilogueTile<T::kTileK, T::kTilePQ, T::kThreads, 4>;
template <class T>
using Thread = ThreadCoord<T, T::kRun>;

// Row of the batch, padding included, of pixel m's window.
__device__ __forceinline__ int32_t window_row(WindowArgs const& a, int32_t m, int32_t* q) {
  int32_t pq;
  int32_t const n = a.div_PQ.divmod(m, &pq);
  return n * a.rows + a.div_Q.divmod(pq, q);
}

// ---- fill

// The fills of one tile, slice after slice: weights [kTerms][kPitchK], then the image [kTileC][patch].
template <class T>
struct Loader {
  WindowArgs const& a;
  int32_t const* table;  // where the pixels of the patch lie in x, or kAbsent
  int32_t positions;     // of the table
  int32_t slice, group, first_k;

  // Its table is ready after the next barrier.
  __device__ __forceinline__ Loader(WindowArgs const& args, OutputTile<T> const& tile, int32_t first_row,
                                    int32_t last_row, int32_t first_slice, int32_t* places)
      : a(args),
        table(places),
        positions((last_row - first_row + 1) * args.row_pitch),
        slice(first_slice),
        group(tile.group),
        first_k(tile.first_k) {
    for (int32_t i = threadIdx.x; i < positions; i += T::kThreads) {
      int32_t column, h;
      int32_t const n = a.div_rows.divmod(first_row + a.div_row_pitch.divmod(i, &column), &h);
      h -= a.p.pad_h;
      int32_t const w = column - a.p.pad_w;
      bool const there = n < a.p.N && static_cast<uint32_t>(h) < static_cast<uint32_t>(a.p.H) &&
                         static_cast<uint32_t>(w) < static_cast<uint32_t>(a.p.W);
      places[i] =
          there ? static_cast<int32_t>(n * a.p.x_stride[0] + h * a.p.x_stride[2] + w * a.p.x_stride[3]) : kAbsent;
    }
  }

  // Starts the copies of the next slice. A barrier lies between two calls.
  __device__ __forceinline__ void fill(float* stage) {
    {
      int32_t const term = threadIdx.x % 8, row = threadIdx.x / 8;
      float* dst = stage + term * T::kPitchK + row;
#pragma unroll
      for (int k = 0; k < T::kTileK; k += T::kRowsK) {
        if (T::kRowsK > T::kTileK && row >= T::kTileK) break;
        // Those after the last one are not stored.
        int32_t const filter = min(first_k + k + row, (group + 1) * a.Kg - 1);
        float const* const src = static_cast<float const*>(a.p.w) + (int64_t{filter} * a.CRS + slice * kTerms + term);
#pragma unroll
        for (int j = 0; j < kTerms; j += 8) copy4_async(dst + j * T::kPitchK + k, src + j, 1);
      }
    }
    float* const x_smem = stage + kTerms * T::kPitchK;
    float const* const x =
        static_cast<float const*>(a.p.x) + (int64_t{group} * a.Cg + slice * kTileC) * a.p.x_stride[1];
    if (a.channels) {
      int32_t const c = threadIdx.x % 8;
#pragma unroll 4
      for (int32_t i = threadIdx.x / 8; i < positions; i += T::kThreads / 8) {
        int32_t const place = table[i];
        copy4_async(x_smem + c * a.patch + i, x + (place == kAbsent ? 0 : place) + c, place != kAbsent);
      }
    } else {
#pragma unroll 1
      for (int32_t i = threadIdx.x; i < positions; i += T::kThreads) {
        int32_t const place = table[i];
        float const* src = x + (place == kAbsent ? 0 : place);
        float* dst = x_smem + i;
#pragma unroll
        for (int c = 0; c < kTileC; ++c, src += a.p.x_stride[1], dst += a.patch)
          copy4_async(dst, src, place != kAbsent);
      }
    }
    ++slice;
  }
};

// ---- tile

// The kCount pixels of a window.
template <int kCount>
__device__ __forceinline__ void load_window(float const* from, float* to) {
  // Rows and runs of an even length start at multiples of two elements, and those of 4 at multiples of four.
  constexpr int kVectors = kCount % 4 == 2 ? kCount - 2 : 0, kPairs = kCount % 2 == 0 ? kCount : 0;
#pragma unroll
  for (int i = 0; i < kVectors; i += 4) {
    float4 const four = *reinterpret_cast<float4 const*>(from + i);
    to[i] = four.x;
    to[i + 1] = four.y;
    to[i + 2] = four.z;
    to[i + 3] = four.w;
  }
#pragma unroll
  for (int i = kVectors; i < kPairs; i += 2) {
    float2 const two = *reinterpret_cast<float2 const*>(from + i);
    to[i] = two.x;
    to[i + 1] = two.y;
  }
#pragma unroll
  for (int i = kPairs; i < kCount; ++i) to[i] = from[i];
}

// Adds one slice's terms, of the part's channels, to acc[filter][pixel]. `w` is the thread's first filter, `x` its
// windows.
template <class T>
__device__ __forceinline__ void accumulate(WindowArgs const& a, float const* w, float const* const (&windows)[T::kRuns],
                                           float (&acc)[T::kThreadK][T::kThreadPQ]) {
  // What comes next is on its way while a tap is added: the windows of the next row, and each tap's weights of that.
  alignas(16) float w_frag[kS][T::kThreadK];
  float x_frag[kR][T::kRuns][T::kWindow];
  auto const load_w = [&](int r, int s) {
#pragma unroll
    for (int i = 0; i < T::kGroupsK; ++i)
      *reinterpret_cast<float4*>(&w_frag[s][4 * i]) =
          *reinterpret_cast<float4 const*>(w + (r * kS + s) * T::kPitchK + i * (T::kTileK / T::kGroupsK));
  };
  float const* x[T::kRuns];
  auto const load_x = [&](int r) {
#pragma unroll
    for (int i = 0; i < T::kRuns; ++i) load_window<T::kWindow>(x[i] + r * a.row_pitch, x_frag[r][i]);
  };
#pragma unroll
  for (int i = 0; i < T::kRuns; ++i) x[i] = windows[i];
  auto const add_term = [&](int r, int s, int i, int j) {
    acc[i][j] += fabsf(x_frag[r][j / T::kRun][j % T::kRun + s] - w_frag[s][i]);
  };
  load_x(0);
#pragma unroll
  for (int s = 0; s < kS; ++s) load_w(0, s);
#pragma unroll 1
  for (int32_t c = 0; c < T::kPartC; ++c) {
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      if (r + 1 < kR) {
        load_x(r + 1);
      } else if (c + 1 < T::kPartC) {  // the last channel is read twice: what follows it is being filled
        w += kR * kS * T::kPitchK;
#pragma unroll
        for (int i = 0; i < T::kRuns; ++i) x[i] += a.patch;
      }
      if (r + 1 == kR) load_x(0);
#pragma unroll
      for (int s = 0; s < kS; ++s) {
        // Of the two orders, the one of which the compiler makes fewer dispatch stalls.
        if constexpr (T::kRun == 7) {
#pragma unroll
          for (int i = 0; i < T::kThreadK; ++i)
#pragma unroll
            for (int j = 0; j < T::kThreadPQ; ++j) add_term(r, s, i, j);
        } else {
#pragma unroll
          for (int j = 0; j < T::kThreadPQ; ++j)
#pragma unroll
            for (int i = 0; i < T::kThreadK; ++i) add_term(r, s, i, j);
        }
        load_w((r + 1) % kR, s);
      }
    }
  }
}

// Writes the sums to shared memory for the transpose, or adds them to what is there.
template <class T>
__device__ __forceinline__ void transpose_sums(FpropArgs const& a, Thread<T> const& thread,
                                               float const (&acc)[T::kThreadK][T::kThreadPQ], bool first, float* sums) {
  using Transpose = typename OutputTile<T>::Transpose;
  auto const put4 = [&](int i, int j, float4 v) {
    float4* const to = reinterpret_cast<float4*>(&sums[Transpose::index(a, thread.k(i), thread.pq(j))]);
    if (!first) add(&v, *to);
    *to = v;
  };
  if (a.y_channels_last) {
#pragma unroll
    for (int i = 0; i < T::kThreadK; i += 4)
#pragma unroll
      for (int j = 0; j < T::kThreadPQ; ++j)
        put4(i, j, make_float4(acc[i][j], acc[i + 1][j], acc[i + 2][j], acc[i + 3][j]));
  } else if constexpr (T::kRun % 4 == 0) {
#pragma unroll
    for (int i = 0; i < T::kThreadK; ++i)
#pragma unroll
      for (int j = 0; j < T::kThreadPQ; j += 4)
        put4(i, j, make_float4(acc[i][j], acc[i][j + 1], acc[i][j + 2], acc[i][j + 3]));
  } else {
#pragma unroll
    for (int i = 0; i < T::kThreadK; ++i)
#pragma unroll
      for (int j = 0; j < T::kThreadPQ; ++j) {
        float* const to = &sums[Transpose::index(a, thread.k(i), thread.pq(j))];
        *to = first ? acc[i][j] : *to + acc[i][j];
      }
  }
}

// ---- kernel

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSM)
    adder2d_fprop_window_kernel(__grid_constant__ WindowArgs const a, __grid_constant__ TileConfig const config) {
  extern __shared__ __align__(16) float smem[];
  launch_dependents();
  WorkTile const work(config);
  int32_t const part = threadIdx.x / T::kPartThreads, stage_size = stage_floats(T::kTileK, a.patch);
  OutputTile<T> const tile(a, config, work.tile);
  Thread<T> const thread(threadIdx.x % T::kPartThreads);

  int32_t q;
  int32_t const last_pixel = min(tile.first_pixel + T::kTilePQ, a.NPQ) - 1;
  int32_t const first_row = window_row(a, tile.first_pixel, &q), last_row = window_row(a, last_pixel, &q) + kR - 1;
  Loader<T> loader(a, tile, first_row, last_row, work.first, reinterpret_cast<int32_t*>(smem + kStages * stage_size));
  int32_t const first_w = part * T::kPartC * kR * kS * T::kPitchK + thread.thread_k;
  int32_t first_x[T::kRuns];
#pragma unroll
  for (int i = 0; i < T::kRuns; ++i) {
    // Runs after the last one add up the last one's windows, and are not stored.
    int32_t const row = window_row(a, min(tile.first_pixel + thread.pq(i * T::kRun), a.NPQ - T::kRun), &q) - first_row;
    first_x[i] = kTerms * T::kPitchK + part * T::kPartC * a.patch + row * a.row_pitch + q;
  }

  __syncthreads();
  loader.fill(smem);
  copy_commit();
  float acc[T::kThreadK][T::kThreadPQ] = {};
  int32_t stage = 0;
  for (int32_t slice = work.first; slice < work.last; ++slice) {
    copy_wait<0>();
    __syncthreads();
    float const* const current = smem + stage;
    stage = stage_size - stage;
    if (loader.slice < work.last) loader.fill(smem + stage);
    copy_commit();
    float const* windows[T::kRuns];
#pragma unroll
    for (int i = 0; i < T::kRuns; ++i) windows[i] = current + first_x[i];
    accumulate<T>(a, current + first_w, windows, acc);
  }
  static_assert(kStages == 2, "a slice is filled while the other one is read");

  __syncthreads();
#pragma unroll
  for (int i = 0; i < T::kParts; ++i) {
    if (part == i) transpose_sums<T>(a, thread, acc, i == 0, smem);
    __syncthreads();
  }
  store_transposed(a, config, work, tile, smem);
}

// ---- launcher

template <class T>
cudaError_t launch_tile(WindowArgs const& args, TileConfig const& config, cudaStream_t stream) {
  size_t const bytes = std::max<size_t>(smem_size(T::kTileK, args.patch), 16 * OutputTile<T>::kItems * T::kThreads);
  size_t const most = std::max(bytes, std::min(smem_size(T::kTileK, kMaxPatch), smem_limit()));
  return launch_tiled<OutputTile<T>>(adder2d_fprop_window_kernel<T>, bytes, most, T::kThreads, false, args, config,
                                     stream);
}

// kWide pixels of a thread: 8 in runs of 4 or 2, or one run of 7.
template <int kRun, int kWide = kRun == 7 ? 7 : 8>
using Tile64x128 = Tile<64, 16 * kWide, kRun, 8, kWide, 4, 1, kArch.window_blocks_64>;
template <int kRun, int kWide = kRun == 7 ? 7 : 8>
using Tile32x128 = Tile<32, 16 * kWide, kRun, 4, kWide, 4, 1, kArch.window_blocks_32>;
template <int kRun, int kWide = kRun == 7 ? 7 : 8>
// Small problems: two parts of a block, and four times as many blocks.
using Tile32x64 = Tile<32, 8 * kWide, kRun, 4, kWide, 4, 2, kArch.window_blocks_32>;
template <int kRun, int kWide = kRun == 7 ? 7 : 8>
using Tile16x512 = Tile<16, 64 * kWide, kRun, 4, kWide, 4, 1, kArch.window_blocks_16>;

constexpr int32_t kTileCount = 4;
template <int kRun>
constexpr double kRate = kRun == 4   ? kArch.window_rate_4
                         : kRun == 7 ? kArch.window_rate_7
                                     : kArch.window_rate_2;
// In the order of launch_run.
template <int kRun>
constexpr TileSize kTiles[kTileCount] = {
    {64, Tile64x128<kRun>::kTilePQ, kTerms, Tile64x128<kRun>::kBlocksPerSM, kRate<kRun>},
    {32, Tile32x128<kRun>::kTilePQ, kTerms, Tile32x128<kRun>::kBlocksPerSM, kArch.window_rate_32},
    {32, Tile32x64<kRun>::kTilePQ, kTerms, Tile32x64<kRun>::kBlocksPerSM, kRate<kRun> - kArch.window_rate_small_less},
    {16, Tile16x512<kRun>::kTilePQ, kTerms, Tile16x512<kRun>::kBlocksPerSM, kArch.window_rate_16},
};

template <int kRun>
cudaError_t launch_run(WindowArgs const& args, TileConfig const& config, cudaStream_t stream) {
  switch (config.tile % kTileCount) {
    case 0: return launch_tile<Tile64x128<kRun>>(args, config, stream);
    case 1: return launch_tile<Tile32x128<kRun>>(args, config, stream);
    case 2: return launch_tile<Tile32x64<kRun>>(args, config, stream);
    case 3: return launch_tile<Tile16x512<kRun>>(args, config, stream);
  }
  return cudaErrorInvalidValue;
}

// Rows of the output hold a whole number of runs.
struct Run {
  int32_t pixels;
  TileSize const* tiles;
  cudaError_t (*launch)(WindowArgs const&, TileConfig const&, cudaStream_t);
};
// TileConfig::tile is an index of these times kTileCount, and a tile's.
constexpr Run kRuns[] = {{4, kTiles<4>, launch_run<4>}, {7, kTiles<7>, launch_run<7>}, {2, kTiles<2>, launch_run<2>}};

// Elements of an image row in shared memory.
int32_t row_pitch_of(FpropArgs const& a, int32_t run) {
  // Windows that a warp reads at once lie in different banks as far as possible: an odd number of vectors, of 4, 2
  // or 1.
  int32_t const vector = run % 4 == 0 ? 4 : run % 2 == 0 ? 2 : 1;
  return (ceil_div(a.p.Q + kS - 1, vector) | 1) * vector;
}

// Elements of a channel in shared memory, for tiles of `pixels`.
int32_t patch_of(FpropArgs const& a, int32_t run, int32_t pixels) {
  int32_t const Q = a.p.Q, P = a.p.P;
  int32_t const lines = (Q - std::gcd(Q, pixels) + pixels - 1) / Q + 1;  // of the output that a tile touches
  bool const even = pixels % Q == 0;                                     // tiles start at the start of a line
  // Borders between images in a tile.
  int32_t const borders = lines == 1 || (even && P % lines == 0) ? 0
                          : even && lines % P == 0               ? lines / P - 1
                                                                 : (lines - 2) / P + 1;
  return ceil_div((lines + (kR - 1) * (1 + borders)) * row_pitch_of(a, run), 8) * 8 + 4;
}

// Whether rows hold a whole number of runs, and shared memory all tiles.
bool can_implement_run(FpropArgs const& a, Run const& run) {
  size_t const limit = smem_limit();
  return a.p.Q % run.pixels == 0 && std::all_of(run.tiles, run.tiles + kTileCount, [&](TileSize const& size) {
           int32_t const patch = patch_of(a, run.pixels, size.pq);
           return patch <= kMaxPatch && smem_size(size.k, patch) <= limit;
         });
}

// By run, then by tile.
constexpr char const* kTileNames[] = {"64x128r4", "32x128r4", "32x64r4",  "16x512r4", "64x112r7", "32x112r7",
                                      "32x56r7",  "16x448r7", "64x128r2", "32x128r2", "32x64r2",  "16x512r2"};
constexpr int32_t kNameCount = sizeof(kTileNames) / sizeof(kTileNames[0]);
static_assert(kNameCount == kTileCount * sizeof(kRuns) / sizeof(kRuns[0]), "one name a tile and run");

bool can_implement(FpropArgs const& args, size_t) {
  Adder2dParams const& p = args.p;
  if (p.x_type != ADDER2D_FLOAT32 || p.w_type != ADDER2D_FLOAT32 || p.R != kR || p.S != kS || p.stride_h != 1 ||
      p.stride_w != 1 || p.dil_h != 1 || p.dil_w != 1 || args.Cg % kTileC != 0)
    return false;
  int64_t const reach = (p.N - 1) * p.x_stride[0] + (p.H - 1) * p.x_stride[2] + (p.W - 1) * p.x_stride[3];
  return reach <= INT32_MAX && int64_t{p.N} * (p.P + kR - 1) <= INT32_MAX;
}

bool plan(FpropArgs const& args, size_t workspace_bytes, TileForce const& force, TileConfig* config, double* cycles) {
  if (force.packed == 1) return false;
  TileProblem const problem{args.Kg, args.NPQ, args.p.groups, args.CRS};
  bool found = false;
  int32_t first_tile = 0;
  for (Run const& run : kRuns) {
    double predicted = 0;
    TileConfig candidate{};
    TileForce own = force;
    if (force.tile >= 0) own.tile = force.tile - first_tile;
    bool const allowed = force.tile < 0 || (own.tile >= 0 && own.tile < kTileCount);
    if (allowed && can_implement_run(args, run))
      candidate = choose_tile(problem, run.tiles, kTileCount, SplitReduce::kForward, workspace_bytes, own, &predicted);
    if (predicted > 0 && (!found || predicted < *cycles)) {
      *config = candidate;
      config->tile += first_tile;
      *cycles = predicted;
      found = true;
    }
    first_tile += kTileCount;
  }
  return found;
}

cudaError_t launch_plan(FpropArgs const& problem, TileConfig const& config, cudaStream_t stream) {
  Run const& run = kRuns[config.tile / kTileCount];
  WindowArgs args{problem};
  args.rows = problem.p.P + kR - 1;
  args.row_pitch = row_pitch_of(problem, run.pixels);
  args.patch = patch_of(problem, run.pixels, run.tiles[config.tile % kTileCount].pq);
  args.div_rows = FastDiv(args.rows);
  args.div_row_pitch = FastDiv(args.row_pitch);
  args.channels = problem.p.x_stride[1] == 1 && problem.p.x_stride[3] != 1;
  return run.launch(args, config, stream);
}

}  // namespace

FpropFamily const kFpropWindow{{"window", kTileNames, kNameCount}, can_implement, nullptr, plan, launch_plan};

}  // namespace adder2d
