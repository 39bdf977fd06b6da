// The weight gradient of 3x3 layers with few channels: sum(dy * x) and sum(dy) over all pixels on float32 arithmetic.
//
// Few channels make a small matrix of sums, 144 by 16 in ResNet-20's first stage, over very many pixels. A block owns a
// tile of kTileK filters by kTileC channels by all nine taps, and some of the pixels. Chunks of dy, with the patch of x
// that they read, go through a ring in shared memory, channels side by side: no tap is copied twice, as im2col would. A
// thread keeps the sums of 8 filters by 4 channels by the three taps of one row of the kernel, and walks along a row of
// dy with a window of three pixels of x in registers: per pixel it reads one new pixel of x and one of dy, 3 x 16 bytes
// for 96 products. Groups of threads take different rows of the chunk.
//
// Sums of groups meet in shared memory, those of blocks in the workspace, always in the same order: results repeat
// exactly.
#include <algorithm>

#include "common/device.h"
#include "common/launch.cuh"
#include "common/plan_cache.h"
#include "tile/arch.h"
#include "wgrad/wgrad_load.cuh"

namespace adder2d {
namespace {

using namespace wgrad_simt;

// ---- tile

// Adds a row of dy, `strip` pixels, to the sums of the taps along s.
template <class T, int kStride>
__device__ __forceinline__ void add_row(float const* x_smem, float const* dy_smem, int32_t strip,
                                        float (&acc)[kTaps][T::kThreadK][T::kThreadC]) {
  // What the next pixel needs is read while this one is added. Nothing is read after the last one: it may be being
  // filled.
  constexpr int kRing = kUnroll * kStride;
  static_assert(kRing >= kTaps + kStride, "a window, and what comes into it next");
  float x[kRing][T::kThreadC], dy[2][T::kThreadK];
  auto const load_x = [&](int column) {
    *reinterpret_cast<float4*>(x[column % kRing]) = *reinterpret_cast<float4 const*>(x_smem + column * T::kPitchC);
  };
  auto const load_dy = [&](int pixel) {
    *reinterpret_cast<float4*>(&dy[pixel % 2][0]) = *reinterpret_cast<float4 const*>(dy_smem + pixel * T::kPitchK);
    *reinterpret_cast<float4*>(&dy[pixel % 2][4]) =
        *reinterpret_cast<float4 const*>(dy_smem + pixel * T::kPitchK + T::kTileK / 2);
  };
#pragma unroll
  for (int s = 0; s < kTaps; ++s) load_x(s);
  load_dy(0);
#pragma unroll 1
  for (; strip > 0; strip -= kUnroll, x_smem += kRing * T::kPitchC, dy_smem += kUnroll * T::kPitchK) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u + 1 < kUnroll || strip > kUnroll) {
        load_dy(u + 1);
#pragma unroll
        for (int j = 0; j < kStride; ++j) load_x(u * kStride + kTaps + j);
      }
#pragma unroll
      for (int s = 0; s < kTaps; ++s)
#pragma unroll
        for (int k = 0; k < T::kThreadK; ++k)
#pragma unroll
          for (int c = 0; c < T::kThreadC; ++c)
            acc[s][k][c] = fmaf(dy[u % 2][k], x[(u * kStride + s) % kRing][c], acc[s][k][c]);
    }
  }
}

__device__ __forceinline__ void add(float4* sum, float4 const& v) {
  sum->x += v.x;
  sum->y += v.y;
  sum->z += v.z;
  sum->w += v.w;
}

// ---- kernels

template <class T, int kStride>
__global__ void __launch_bounds__(T::kThreads, 1)
    adder2d_wgrad_simt_kernel(__grid_constant__ Args const a, __grid_constant__ WgradConfig const config) {
  extern __shared__ __align__(16) float smem[];
  launch_dependents();
  int32_t const tile = blockIdx.x % config.tiles, split = blockIdx.x / config.tiles;
  TileCoord const coord(config, tile);
  int32_t const first = static_cast<int32_t>(int64_t{config.chunks} * split / config.splits);
  int32_t const last = static_cast<int32_t>(int64_t{config.chunks} * (split + 1) / config.splits);
  int32_t const warp = threadIdx.x / 32, r = warp % kTaps, slot = warp / kTaps * 32 + threadIdx.x % 32;
  int32_t const thread_c = slot % T::kLanesC * 4, thread_k = slot / T::kLanesC % T::kLanesK * 4;
  int32_t const group = slot / (T::kLanesC * T::kLanesK);
  int32_t const x_floats = config.images * config.x_rows * config.x_columns * T::kPitchC,
                cells = config.images * config.rows;
  constexpr int kQuads = T::kTileK / 4;  // of filters

  float acc[kTaps][T::kThreadK][T::kThreadC] = {};
  float4 dy_sum = {};  // of four filters, over the thread's share of the pixels
  int32_t stage = 0, fill_stage = 0;
#pragma unroll 1
  for (int32_t chunk = first - (kStages - 1); chunk < last; ++chunk) {
    if (chunk >= first) {
      copy_wait<kStages - 2>();
      __syncthreads();
    }
    if (chunk + kStages - 1 < last)
      fill<T>(a, config, coord, chunk + kStages - 1, smem + fill_stage * config.stage_floats);
    fill_stage = fill_stage + 1 == kStages ? 0 : fill_stage + 1;
    copy_commit();  // an empty group keeps the count that copy_wait relies on
    if (chunk < first) continue;
    float const* const x_smem = smem + stage * config.stage_floats + thread_c;
    float const* const dy_smem = smem + stage * config.stage_floats + x_floats;
    stage = stage + 1 == kStages ? 0 : stage + 1;
    if (coord.tile_c == 0) {
      float const* share = dy_smem + threadIdx.x / kQuads * T::kPitchK + threadIdx.x % kQuads * 4;
      constexpr int kStep = T::kThreads / kQuads * T::kPitchK;
      for (int32_t i = threadIdx.x; i < cells * config.strip * kQuads; i += T::kThreads, share += kStep)
        add(&dy_sum, *reinterpret_cast<float4 const*>(share));
    }
#pragma unroll 1
    for (int32_t cell = group; cell < cells; cell += T::kGroups) {
      int32_t row;
      int32_t const image = config.div_rows.divmod(cell, &row);
      int32_t const x_row = image * config.x_rows + row * a.p.layer.stride_h + r * a.p.layer.dil_h;
      add_row<T, kStride>(x_smem + x_row * config.x_columns * T::kPitchC,
                          dy_smem + cell * config.strip * T::kPitchK + thread_k, config.strip, acc);
    }
  }

  // The groups' sums meet, for one tap along s after the other.
  constexpr int kTurnQuads = kTaps * T::kSums / 4;
  float4* const partial =
      reinterpret_cast<float4*>(a.partial) + (int64_t{split} * config.tiles + tile) * kTaps * kTurnQuads;
#pragma unroll
  for (int s = 0; s < kTaps; ++s) {
    __syncthreads();
    float* const own = smem + (group * kTaps + r) * T::kSums + thread_c;
#pragma unroll
    for (int k = 0; k < T::kThreadK; ++k)
      *reinterpret_cast<float4*>(own + (k / 4 * (T::kTileK / 2) + thread_k + k % 4) * T::kTileC) =
          make_float4(acc[s][k][0], acc[s][k][1], acc[s][k][2], acc[s][k][3]);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTurnQuads; i += T::kThreads) {
      int32_t const quad = i + threadIdx.x;
      if (quad >= kTurnQuads) break;
      float4 sum = reinterpret_cast<float4 const*>(smem)[quad];
#pragma unroll
      for (int g = 1; g < T::kGroups; ++g) add(&sum, reinterpret_cast<float4 const*>(smem)[g * kTurnQuads + quad]);
      partial[s * kTurnQuads + quad] = sum;
    }
  }
  if (coord.tile_c != 0) return;
  // So do the threads' sums of dy.
#pragma unroll
  for (int lanes = kQuads; lanes < 32; lanes *= 2) {
    dy_sum.x += __shfl_xor_sync(0xffffffff, dy_sum.x, lanes);
    dy_sum.y += __shfl_xor_sync(0xffffffff, dy_sum.y, lanes);
    dy_sum.z += __shfl_xor_sync(0xffffffff, dy_sum.z, lanes);
    dy_sum.w += __shfl_xor_sync(0xffffffff, dy_sum.w, lanes);
  }
  __syncthreads();
  if (threadIdx.x % 32 < kQuads) reinterpret_cast<float4*>(smem)[warp * kQuads + threadIdx.x % 32] = dy_sum;
  __syncthreads();
  if (threadIdx.x >= T::kTileK) return;
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < T::kWarps; ++i) sum += smem[i * T::kTileK + threadIdx.x];
  int64_t const row = (int64_t{split} * a.p.layer.groups + coord.group) * config.tiles_k + coord.tile_k;
  a.sums[row * T::kTileK + threadIdx.x] = sum;
}

// Adds the splits in order, subtracts w * sum(dy), and sums the squares of a block's weights.
template <class T>
__global__ void __launch_bounds__(kReduceLanes* kReduceParts)
    adder2d_wgrad_reduce_kernel(__grid_constant__ Args const a, __grid_constant__ WgradConfig const config) {
  __shared__ float2 smem[kReduceParts][kReduceLanes];
  static_assert(T::kSums % kReduceLanes == 0, "a block has one tap of one tile");
  launch_dependents();
  int32_t const lane = threadIdx.x % kReduceLanes, part = threadIdx.x / kReduceLanes;
  int32_t const index = blockIdx.x * kReduceLanes + lane, sum_index = index % T::kSums, turn = index / T::kSums;
  int32_t const r = turn % kTaps, s = turn / kTaps % kTaps;
  TileCoord const coord(config, turn / (kTaps * kTaps));
  int32_t const tile_sum_k = sum_index / T::kTileC;
  int32_t const k = coord.tile_k * T::kTileK + tile_sum_k, c = coord.tile_c * T::kTileC + sum_index % T::kTileC;
  int64_t const splits_step = int64_t{config.tiles} * kTaps * kTaps * T::kSums;
  int32_t const sums_step = a.p.layer.groups * config.tiles_k * T::kTileK;
  float const* partial = a.partial + index;
  float const* sums = a.sums + (coord.group * config.tiles_k + coord.tile_k) * T::kTileK + tile_sum_k;
  wait_for_primary();
  float convolved = 0.f, total = 0.f;
#pragma unroll 4
  for (int32_t split = part; split < config.splits; split += kReduceParts) {
    convolved += partial[split * splits_step];
    total += sums[int64_t{split} * sums_step];
  }
  smem[part][lane] = make_float2(convolved, total);
  __syncthreads();
  if (part != 0) return;
#pragma unroll
  for (int i = 1; i < kReduceParts; ++i) {
    convolved += smem[i][lane].x;
    total += smem[i][lane].y;
  }
  double square = 0;
  if (k < a.Kg && c < a.Cg) {
    int64_t const filter = int64_t{coord.group} * a.Kg + k;
    int64_t const at = a.p.channels_last ? ((filter * kTaps + r) * kTaps + s) * a.Cg + c
                                         : ((filter * a.Cg + c) * kTaps + r) * kTaps + s;
    float const dw = fmaf(-load_as_float(a.p.layer.w, at, a.p.layer.w_type), total, convolved);
    a.p.dw[at] = dw;
    square = static_cast<double>(dw) * dw;
  }
  if (a.squares == nullptr) return;
#pragma unroll
  for (int half = 16; half > 0; half /= 2) square += __shfl_xor_sync(0xffffffff, square, half);
  if (lane == 0) a.squares[blockIdx.x] = square;
}

// ---- plan

constexpr int32_t kMaxStrip = 64, kMaxCells = 64, kMaxWaves = 3;
constexpr int64_t kMaxChain = 4096;  // products that a thread adds up: with more of them rounding errors grow

Source make_source(void const* data, int32_t type, int64_t const* stride, int32_t channels, int32_t N, int32_t H,
                   int32_t W) {
  Source source{data, {stride[0], stride[1], stride[2], stride[3]}, type, N, H, W, false};
  bool const steps = (N == 1 || stride[0] % 4 == 0) && (H == 1 || stride[2] % 4 == 0) && (W == 1 || stride[3] % 4 == 0);
  source.vectors =
      stride[1] == 1 && steps && channels % 4 == 0 && reinterpret_cast<uintptr_t>(data) % (4 * type_size(type)) == 0;
  return source;
}

Args make_args(Adder2dWgradParams const& params) {
  Adder2dParams const& p = params.layer;
  Args args{};
  args.p = params;
  args.Cg = p.C / p.groups;
  args.Kg = p.K / p.groups;
  args.x = make_source(p.x, p.x_type, p.x_stride, args.Cg, p.N, p.H, p.W);
  args.dy = make_source(p.y, p.y_type, p.y_stride, args.Kg, p.N, p.P, p.Q);
  return args;
}

bool can_implement(Args const& args) {
  Adder2dParams const& p = args.p.layer;
  return p.N > 0 && p.R == kTaps && p.S == kTaps && p.dil_w == 1 && p.stride_w <= 2;
}

// Where this kernel is faster than a convolution (docs/performance.md): at most 64 channels and filters a group; with
// halves, which a convolution multiplies on tensor cores, not the largest of these.
bool is_preferred(Args const& args) {
  Adder2dParams const& p = args.p.layer;
  if (is_16_bit(p.x_type) && args.Cg * args.Kg > 2048 && int64_t{p.N} * p.P * p.Q > 65536) return false;
  return args.Cg >= 8 && args.Cg <= 64 && args.Kg >= 8 && args.Kg <= 64;
}

// Predicted cycles of the fill of a row, of one warp. The constants here and below only have to rank.
double predict_row(Source const& source, int32_t columns, int32_t tile) {
  int32_t const copies = source.vectors ? ceil_div(columns, 128 / tile) : ceil_div(columns, 8) * (tile / 4);
  return 25 + copies * (source.vectors ? 8 : 4) * (source.type == ADDER2D_FLOAT32 ? 1 : 2);
}

// Of a block, whatever the config.
size_t most_smem() { return std::min(smem_limit(), kArch.wgrad_max_smem); }

// `tile` is an index into kTiles, or below 0 for the best one.
WgradConfig choose(Args const& args, int32_t tile) {
  Adder2dParams const& p = args.p.layer;
  size_t const smem_bytes = most_smem();
  int32_t const multiprocessors = multiprocessor_count();
  WgradConfig best{};
  double best_cycles = 0;

  auto const consider = [&](WgradConfig config, ChunkTileSize const& size, int64_t chunks_n, int32_t chunks_p,
                            int32_t chunks_q) {
    int64_t const x_rows = int64_t{config.rows - 1} * p.stride_h + int64_t{kTaps - 1} * p.dil_h + 1;
    int64_t const x_columns = int64_t{config.strip - 1} * p.stride_w + kTaps;
    int64_t const cells = int64_t{config.images} * config.rows, turns = ceil_div<int64_t>(cells, size.groups);
    int64_t const floats = config.images * x_rows * x_columns * (size.c + 4) + cells * config.strip * (size.k + 4);
    size_t const ring_bytes = kStages * floats * sizeof(float);
    int64_t const chunks = chunks_n * chunks_p * chunks_q;
    if (ring_bytes > smem_bytes || chunks > INT32_MAX - kStages) return;
    config.x_rows = static_cast<int32_t>(x_rows);
    config.x_columns = static_cast<int32_t>(x_columns);
    config.chunks = static_cast<int32_t>(chunks);
    config.stage_floats = static_cast<int32_t>(floats);
    config.smem_bytes = std::max(ring_bytes, kTurnBytes);
    // A scheduler has a quarter of the warps. It adds 96 products a pixel, with 8 other instructions.
    double const rows = config.images * (x_rows * predict_row(args.x, config.x_columns, size.c) +
                                         config.rows * predict_row(args.dy, config.strip, size.k));
    double const chunk = kWarps / 4 * turns * (config.strip * 104 + 40) + rows / 4 + 300;
    for (int32_t waves = 1; waves <= kMaxWaves; ++waves) {
      int64_t const full = int64_t{waves} * multiprocessors / config.tiles,
                    least = ceil_div(chunks * turns * config.strip, kMaxChain);
      int64_t const splits = std::clamp<int64_t>(std::max(full, least), 1, chunks);
      int64_t const blocks = splits * config.tiles, block_chunks = ceil_div(chunks, splits);
      int64_t const weights = int64_t{config.tiles} * kTaps * kTaps * size.k * size.c;
      int64_t const sums = int64_t{p.groups} * config.tiles_k * size.k;
      int64_t const partial_bytes = splits * weights * sizeof(float);
      if (weights > INT32_MAX || blocks > INT32_MAX || partial_bytes > static_cast<int64_t>(kMaxWorkspaceBytes))
        continue;
      double const bytes = 2.0 * partial_bytes;  // written, then read
      double const block = block_chunks * chunk + 6000 + floats / 5.;
      double const cycles = ceil_div(blocks, int64_t{multiprocessors}) * block + bytes / (multiprocessors * 12.);
      if (best.taken && cycles >= best_cycles) continue;
      best_cycles = cycles;
      best = config;
      best.taken = true;
      best.splits = static_cast<int32_t>(splits);
      best.div_chunks_q = FastDiv(chunks_q);
      best.div_chunks_p = FastDiv(chunks_p);
      best.div_rows = FastDiv(config.rows);
      best.div_x_rows = FastDiv(config.x_rows);
      best.reduce_blocks = static_cast<int32_t>(weights / kReduceLanes);
      best.squares_bytes = best.reduce_blocks * sizeof(double);
      best.partial_bytes = partial_bytes;
      best.workspace_bytes = best.squares_bytes + partial_bytes + splits * sums * sizeof(float);
    }
  };

  for (ChunkTileSize const& size : kTiles) {
    WgradConfig config{};
    config.tile = static_cast<int32_t>(&size - kTiles);
    if (tile >= 0 && config.tile != tile) continue;
    config.tiles_k = ceil_div(args.Kg, size.k);
    config.tiles_c = ceil_div(args.Cg, size.c);
    if (int64_t{config.tiles_k} * config.tiles_c * p.groups > INT32_MAX) continue;
    config.tiles = config.tiles_k * config.tiles_c * p.groups;
    for (config.strip = kUnroll; config.strip <= kMaxStrip; config.strip += kUnroll) {
      int32_t const chunks_q = ceil_div(p.Q, config.strip);
      if (ceil_div(ceil_div(p.Q, chunks_q), kUnroll) * kUnroll != config.strip) continue;  // a shorter one does as well
      for (config.rows = 1; config.rows <= std::min(p.P, kMaxCells); ++config.rows) {
        int32_t const chunks_p = ceil_div(p.P, config.rows);
        if (ceil_div(p.P, chunks_p) != config.rows) continue;
        int32_t const images = chunks_p == 1 ? std::min(p.N, kMaxCells / config.rows) : 1;
        for (config.images = 1; config.images <= images; ++config.images)
          consider(config, size, ceil_div(p.N, config.images), chunks_p, chunks_q);
      }
    }
  }
  return best;
}

// ---- launcher

template <class T, int kStride>
cudaError_t launch_tile(Args const& args, WgradConfig const& config, cudaStream_t stream) {
  auto const kernel = adder2d_wgrad_simt_kernel<T, kStride>;
  cudaError_t error = allow_smem(kernel, most_smem());
  if (error != cudaSuccess) return error;
  error =
      launch(kernel, dim3(config.tiles * config.splits), dim3(T::kThreads), config.smem_bytes, stream, args, config);
  if (error != cudaSuccess) return error;
  dim3 const blocks(config.reduce_blocks), threads(kReduceLanes * kReduceParts);
  return launch_dependent(adder2d_wgrad_reduce_kernel<T>, blocks, threads, 0, stream, args, config);
}

template <class T>
cudaError_t launch_any_stride(Args const& args, WgradConfig const& config, cudaStream_t stream) {
  return args.p.layer.stride_w == 1 ? launch_tile<T, 1>(args, config, stream) : launch_tile<T, 2>(args, config, stream);
}

}  // namespace

FamilyNames const kWgradSimt{"simt", kTileNames, kTileCount};

WgradConfig plan_wgrad_simt(Adder2dWgradParams const& params, TileForce const* force) {
  Adder2dParams key = params.layer;  // what a plan depends on
  key.x = key.w = key.b = key.y = key.workspace = nullptr;
  key.workspace_bytes = 0;
  auto const plan = [&](int32_t tile) {
    Adder2dWgradParams problem = params;
    problem.layer = key;
    Args const args = make_args(problem);
    return can_implement(args) && (force != nullptr || is_preferred(args)) ? choose(args, tile) : WgradConfig{};
  };
  if (force != nullptr) return plan(force->tile);
  return cached_plan<WgradConfig>(key, [&] { return plan(-1); });
}

cudaError_t launch_wgrad_simt(Adder2dWgradParams const& params, WgradConfig const& config, cudaStream_t stream) {
  Args args = make_args(params);
  char* const workspace = static_cast<char*>(params.layer.workspace);
  args.squares = params.eta > 0 ? reinterpret_cast<double*>(workspace) : nullptr;
  args.partial = reinterpret_cast<float*>(workspace + config.squares_bytes);
  args.sums = reinterpret_cast<float*>(workspace + config.squares_bytes + config.partial_bytes);
  switch (config.tile) {
    case 0: return launch_any_stride<Tile16x16>(args, config, stream);
    case 1: return launch_any_stride<Tile32x16>(args, config, stream);
    case 2: return launch_any_stride<Tile32x32>(args, config, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace adder2d
