// Implicit GEMM on float32 arithmetic: filters by output pixels, reduced over (c, r, s), without an im2col in memory.
//
// A block owns a tile of kTileK filters by kTilePQ output pixels and steps through the reduction kTileC terms at a
// time; asynchronous copies fill a ring of kStages slices in shared memory while a thread accumulates its 8 x 8
// outputs. One accumulated |x - w| is two float32 additions, so everything else in the inner loop is overhead to be
// kept small.
#include <algorithm>

#include "common/launch.cuh"
#include "fprop/fprop.h"
#include "fprop/simt_load.cuh"
#include "tile/arch.h"
#include "tile/mainloop.cuh"
#include "tile/split_k.cuh"

namespace adder2d {
namespace {

using namespace fprop_simt;

// ---- tile

// Accumulates slices first .. last - 1 of one tile into acc[filter][pixel].
template <class T, Fill kFill>
__device__ __forceinline__ void accumulate(FpropArgs const& a, TileConfig const& config,
                                           OutputCoord<T, kIsTransposed<kFill>> const& coord, int32_t first,
                                           int32_t last, Smem<T, kFill>& smem,
                                           float (&acc)[T::kThreadK][T::kThreadPQ]) {
  Loader<T, kFill> loader(a, config, smem, coord, first);
  if constexpr (kIsPacked<kFill>) wait_for_primary();
  int32_t fill_stage = 0;
  auto fill = [&] {
    if (loader.slice < last) loader.fill(config, smem.stage[fill_stage]);
    fill_stage = fill_stage + 1 == T::kStages ? 0 : fill_stage + 1;
    copy_commit();  // an empty group keeps the count that copy_wait relies on
  };
  for (int i = 0; i < T::kStages - 1; ++i) {
    __syncthreads();
    fill();
  }

  int32_t stage = 0;
  for (int32_t slice = first; slice < last; ++slice) {
    copy_wait<T::kStages - 2>();
    __syncthreads();
    float const* const w_smem = smem.stage[stage] + coord.thread_k;
    float const* const x_smem = smem.stage[stage] + T::kTileC * T::kPitchK + coord.thread_pq;
    stage = stage + 1 == T::kStages ? 0 : stage + 1;
    // Unpacked weights may end within the last slice.
    int32_t const left = kIsPacked<kFill> ? T::kTileC : ceil_div(a.CRS - slice * T::kTileC, T::kUnroll) * T::kUnroll;
    add_terms<T>(w_smem, x_smem, min(T::kTileC, left), fill, acc);
  }
}

// Starts the way of a tile's residual into the second-level cache, long before threads wait for it one quad after the
// other. Not inlined, as store4_otherwise.
template <class T>
__device__ __noinline__ void prefetch_residual(FpropArgs const& a, int32_t first_k, int32_t end_k,
                                               int32_t first_pixel) {
  if (a.epilogue.residual == nullptr || a.y_channels_last) return;
  constexpr int kStep = 32, kColumns = T::kTilePQ / kStep;  // 32 elements are a cache line, or half of one
  int32_t const size = a.epilogue.residual_type == ADDER2D_FLOAT32 ? 4 : 2;
  for (int32_t i = threadIdx.x; i < T::kTileK * kColumns; i += T::kThreads) {
    int32_t const k = first_k + i / kColumns, m = first_pixel + i % kColumns * kStep;
    if (k >= end_k || m >= a.NPQ) continue;
    int64_t const index = output_offset(a, m) + k * a.p.y_stride[1];
    asm volatile("prefetch.global.L2 [%0];\n" ::"l"(static_cast<char const*>(a.epilogue.residual) + index * size));
  }
}

// ---- kernels

// Weights [K, Cg, R, S] to [groups][Cg / channels][R * S][channels][pitch], zeros after the filters of a group: in the
// order of the slices. A block moves 32 filters by 128 terms through shared memory.
constexpr int kPackFilters = 32, kPackTerms = 128, kPackRows = 8;

__global__ void __launch_bounds__(kPackFilters* kPackRows)
    adder2d_pack_kernel(__grid_constant__ FpropArgs const a, int32_t pitch, int32_t channels) {
  __shared__ float tile[kPackFilters][kPackTerms + 1];
  launch_dependents();
  int32_t const group = blockIdx.z, lane = threadIdx.x % 32, row = threadIdx.x / 32;
  int32_t const first_j = blockIdx.x * kPackTerms, first_k = blockIdx.y * kPackFilters;
#pragma unroll
  for (int i = row; i < kPackFilters; i += kPackRows) {
    float const* const src = static_cast<float const*>(a.p.w) + (int64_t{group} * a.Kg + first_k + i) * a.CRS;
#pragma unroll
    for (int j = lane; j < kPackTerms; j += 32)
      tile[i][j] = first_k + i < a.Kg && first_j + j < a.CRS ? __ldg(src + first_j + j) : 0.f;
  }
  __syncthreads();
  if (first_k + lane >= pitch) return;
#pragma unroll 4
  for (int i = row; i < kPackTerms; i += kPackRows) {
    int32_t const j = first_j + i;
    if (j >= a.CRS) break;
    int32_t rs;
    int32_t const c = a.div_RS.divmod(j, &rs);
    int32_t const term = (c / channels * a.p.R * a.p.S + rs) * channels + c % channels;
    static_cast<float*>(a.p.workspace)[(int64_t{group} * a.CRS + term) * pitch + first_k + lane] = tile[lane][i];
  }
}

template <class T, Fill kFill>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSM)
    adder2d_fprop_simt_kernel(__grid_constant__ FpropArgs const a, __grid_constant__ TileConfig const config) {
  extern __shared__ __align__(16) unsigned char smem_bytes[];
  launch_dependents();
  WorkTile const work(config);
  using Coord = OutputCoord<T, kIsTransposed<kFill>>;
  Coord const coord(a, config, work.tile, threadIdx.x);
  if (!kIsTransposed<kFill> && a.stores_vectors) prefetch_residual<T>(a, coord.first_k, coord.end_k, coord.first_pixel);
  float acc[T::kThreadK][T::kThreadPQ] = {};
  accumulate(a, config, coord, work.first, work.last, *reinterpret_cast<Smem<T, kFill>*>(smem_bytes), acc);
  if constexpr (kIsTransposed<kFill>) {
    using Transpose = typename Coord::Transpose;
    float* const sums = reinterpret_cast<float*>(smem_bytes);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < T::kThreadPQ; ++j)
#pragma unroll
      for (int i = 0; i < T::kThreadK; ++i) sums[Transpose::index(a, coord.k(i), coord.pq(j))] = acc[i][j];
    __syncthreads();
    store_transposed(a, config, work, coord, sums);
  } else {
    if (work.split >= 0) {
      auto const get = [&](int32_t item) {
        float const* const sums = &acc[item / T::kGroupsPQ][item % T::kGroupsPQ * 4];
        return make_float4(sums[0], sums[1], sums[2], sums[3]);
      };
      auto const put = [&](int32_t item, float4 const& v) {
        float* const sums = &acc[item / T::kGroupsPQ][item % T::kGroupsPQ * 4];
        sums[0] = v.x;
        sums[1] = v.y;
        sums[2] = v.z;
        sums[3] = v.w;
      };
      if (!reduce_splits<Coord>(a, config, work, get, put)) return;
    }
#pragma unroll
    for (int j = 0; j < T::kThreadPQ; j += 4) {
      int32_t const m = coord.first_pixel + coord.pq(j);
      int64_t const offset = output_offset(a, m);
#pragma unroll
      for (int i = 0; i < T::kThreadK; ++i)
        store4<false>(a, coord.first_k + coord.k(i), coord.end_k, m, offset,
                      make_float4(acc[i][j], acc[i][j + 1], acc[i][j + 2], acc[i][j + 3]));
    }
  }
}

// ---- launcher

template <class T, Fill kFill>
cudaError_t launch_tile(FpropArgs const& args, TileConfig const& config, cudaStream_t stream) {
  if (kIsPacked<kFill>) {
    int32_t const pitch = config.tiles_k * T::kTileK;
    dim3 const grid(ceil_div(args.CRS, kPackTerms), ceil_div(pitch, kPackFilters), args.p.groups);
    cudaError_t const error =
        launch(adder2d_pack_kernel, grid, dim3(kPackFilters * kPackRows), 0, stream, args, pitch, T::kTileC);
    if (error != cudaSuccess) return error;
  }
  using Coord = OutputCoord<T, kIsTransposed<kFill>>;
  // No more than it needs: the rest is first-level cache.
  constexpr size_t kSmemBytes =
      std::max<size_t>(sizeof(Smem<T, kFill>), kIsTransposed<kFill> ? 16 * Coord::kItems * T::kThreads : 0);
  return launch_tiled<Coord>(adder2d_fprop_simt_kernel<T, kFill>, kSmemBytes, kSmemBytes, T::kThreads, kIsPacked<kFill>,
                             args, config, stream);
}

using Tile64x128 = Tile<64, 128, 32, 2>;
using Tile128x64 = Tile<128, 64, 32, 2>;
using Tile32x256 = Tile<32, 256, 8, 3>;
using Tile16x256 = Tile<16, 256, 8, 3, 4, 8, kArch.simt_blocks_16>;
using Tile32x64 = Tile<32, 64, 16, 3, 4, 4, kArch.simt_blocks_small>;  // small problems: four times as many blocks

template <class T>
constexpr double kRate = T::kThreadK != 8 ? kArch.simt_rate_small
                         : T::kTileC < 16 ? kArch.simt_rate_short_slices
                                          : kArch.simt_rate;
template <class T>
constexpr TileSize kSizeOf{T::kTileK, T::kTilePQ, T::kTileC, T::kBlocksPerSM, kRate<T>};
// In the order of launch_plan.
constexpr TileSize kTiles[] = {kSizeOf<Tile64x128>, kSizeOf<Tile128x64>, kSizeOf<Tile32x256>, kSizeOf<Tile16x256>,
                               kSizeOf<Tile32x64>};
constexpr int32_t kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);

// Channels lie side by side, and 32 bits reach every element.
bool is_channels_last(FpropArgs const& a) {
  int64_t const* const stride = a.p.x_stride;
  return stride[1] == 1 && stride[3] != 1 &&
         (a.p.N - 1) * stride[0] + a.p.C + (a.p.H - 1) * stride[2] + (a.p.W - 1) * stride[3] <= INT32_MAX / 2;
}

Fill choose_fill(FpropArgs const& a, bool packed) {
  if (a.p.x_type != ADDER2D_FLOAT32 || a.p.w_type != ADDER2D_FLOAT32) return Fill::kAny;
  if (packed) return is_channels_last(a) ? Fill::kChannels : is_plane(a) ? Fill::kPlane : Fill::kPixels;
  int64_t const reach = (a.Cg - 1) * a.p.x_stride[1] + int64_t{a.p.R - 1} * a.p.dil_h * a.p.x_stride[2] +
                        int64_t{a.p.S - 1} * a.p.dil_w * a.p.x_stride[3];
  return a.p.R <= kMaxTapsR && a.p.S <= kMaxTapsS && reach <= INT32_MAX ? Fill::kTaps : Fill::kAny;
}

template <class T>
cudaError_t launch_any_fill(FpropArgs const& args, TileConfig const& config, cudaStream_t stream) {
  switch (choose_fill(args, config.packed_bytes != 0)) {
    case Fill::kTaps: return launch_tile<T, Fill::kTaps>(args, config, stream);
    case Fill::kAny: return launch_tile<T, Fill::kAny>(args, config, stream);
    case Fill::kPixels: return launch_tile<T, Fill::kPixels>(args, config, stream);
    case Fill::kChannels: return launch_tile<T, Fill::kChannels>(args, config, stream);
    case Fill::kPlane: return launch_tile<T, Fill::kPlane>(args, config, stream);
  }
  return cudaErrorInvalidValue;
}

constexpr char const* kTileNames[] = {"64x128", "128x64", "32x256", "16x256", "32x64"};
static_assert(sizeof(kTileNames) / sizeof(kTileNames[0]) == kTileCount, "one name a tile");

bool can_implement(FpropArgs const&, size_t) { return true; }

bool plan(FpropArgs const& args, size_t workspace_bytes, TileForce const& force, TileConfig* config, double* cycles) {
  TileProblem const problem{args.Kg, args.NPQ, args.p.groups, args.CRS};
  *config = choose_tile(problem, kTiles, kTileCount, SplitReduce::kForward, workspace_bytes, force, cycles);
  if (*cycles == 0) return false;
  if (args.p.x_type != ADDER2D_FLOAT32 || args.p.w_type != ADDER2D_FLOAT32) *cycles *= kArch.simt_any_fill;
  size_t const packed_bytes = size_t{4} * args.p.groups * args.CRS * config->tiles_k * kTiles[config->tile].k;
  bool const can_pack = args.Cg % kTiles[config->tile].c == 0 && args.p.x_type == ADDER2D_FLOAT32 &&
                        args.p.w_type == ADDER2D_FLOAT32 && config->workspace_bytes + packed_bytes <= workspace_bytes;
  bool const packs =
      force.packed >= 0 ? force.packed == 1 : can_pack && (is_channels_last(args) || *cycles > kArch.simt_pack_cycles);
  if (packs && !can_pack) return false;
  if (packs) {
    config->packed_bytes = packed_bytes;
    config->workspace_bytes += packed_bytes;
  }
  return true;
}

cudaError_t launch_plan(FpropArgs const& args, TileConfig const& config, cudaStream_t stream) {
  switch (config.tile) {
    case 0: return launch_any_fill<Tile64x128>(args, config, stream);
    case 1: return launch_any_fill<Tile128x64>(args, config, stream);
    case 2: return launch_any_fill<Tile32x256>(args, config, stream);
    case 3: return launch_any_fill<Tile16x256>(args, config, stream);
    case 4: return launch_any_fill<Tile32x64>(args, config, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

FpropFamily const kFpropSimt{{"simt", kTileNames, kTileCount}, can_implement, nullptr, plan, launch_plan};

}  // namespace adder2d
