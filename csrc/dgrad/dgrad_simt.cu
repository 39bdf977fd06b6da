// Implicit GEMM for the input gradient on float32 arithmetic: channels by input pixels, reduced over taps and filters.
//
// With w' = w / 2 and x' = x / 2 - 1 / 2, clamp(w - x, -1, 1) = 2 * sat(w' - x') - 1, where sat clamps to [0, 1] as a
// free modifier of an addition. So dx = 2 * sum(dy * sat(w' - x')) - sum(dy): two instructions a term, and the second
// sum is one for all channels of a pixel. Rounding: w' is exact; x' is rounded once, by at most 2^-24 * (|x| + 1) / 2,
// and the difference once more, by at most 2^-25 where it is not clamped, so that a term is off by at most 2^-23 * (1 +
// |x| / 2) * |dy|; and the terms of both sums are at most |dy| each, which bounds what their cancelling costs.
//
// A block owns a tile of kTileC channels by kTileHW pixels of one phase (dgrad.h), so that strides leave no idle taps,
// and steps through the reduction kTileK filters of one tap at a time: asynchronous copies fill a ring of kStages
// slices in shared memory, of packed weights and of dy, while a thread accumulates its 8 x 4 outputs, whose x' it keeps
// in registers.
//
// sat turns NaN into 0. Outputs that the rule may want NaN or infinite come out as NaN here: x is added to them times
// zero, weights with a NaN mark the tiles that read them, and sums of infinite dy are NaN. These few are computed again
// by the rule.
#include <algorithm>
#include <type_traits>

#include "common/cp_async.cuh"
#include "common/device.h"
#include "common/launch.cuh"
#include "dgrad/dgrad_load.cuh"
#include "tile/arch.h"

namespace adder2d {
namespace {

using namespace dgrad_simt;

// ---- store

// Stores the thread's outputs.
template <typename Element, class T>
__device__ __forceinline__ void store_tile(DgradArgs const& a, TileCoord<T> const& coord,
                                           float const (&v)[T::kThreadC][T::kThreadHW]) {
  Element* const dx = static_cast<Element*>(a.dx);
  int64_t index[T::kThreadHW];
  bool present[T::kThreadHW];
  present[0] = coord.locate(a, coord.pixel(0), a.dx_stride, &index[0]);
  if (a.dx_vectors == DgradVectors::kPixels) {
#pragma unroll
    for (int i = 0; i < T::kThreadC; ++i) {
      int32_t const c = coord.channel(i);
      if (present[0] && c < coord.end_c)
        store4_from_float(dx, index[0] + c * a.dx_stride[1], kTypeOf<Element>,
                          make_float4(v[i][0], v[i][1], v[i][2], v[i][3]));
    }
    return;
  }
#pragma unroll
  for (int j = 1; j < T::kThreadHW; ++j) present[j] = coord.locate(a, coord.pixel(j), a.dx_stride, &index[j]);
  if (a.dx_vectors == DgradVectors::kChannels) {
#pragma unroll
    for (int i = 0; i < T::kThreadC; i += 4) {
      int32_t const c = coord.channel(i);
#pragma unroll
      for (int j = 0; j < T::kThreadHW; ++j)
        if (present[j] && c < coord.end_c)
          store4_from_float(dx, index[j] + c, kTypeOf<Element>,
                            make_float4(v[i][j], v[i + 1][j], v[i + 2][j], v[i + 3][j]));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < T::kThreadC; ++i) {
    int32_t const c = coord.channel(i);
#pragma unroll
    for (int j = 0; j < T::kThreadHW; ++j)
      if (present[j] && c < coord.end_c) store_from_float(dx, index[j] + c * a.dx_stride[1], kTypeOf<Element>, v[i][j]);
  }
}

// Stores one item of the thread's outputs.
template <typename Element, class T>
__device__ __forceinline__ void store_item(DgradArgs const& a, TileCoord<T> const& coord, int32_t item,
                                           float const (&v)[4]) {
  bool const channels = a.dx_vectors == DgradVectors::kChannels;
  int32_t const c = coord.channel(TileCoord<T>::item_channel(channels, item, 0));
  if (c >= coord.end_c) return;
  Element* const dx = static_cast<Element*>(a.dx) + c * a.dx_stride[1];
  int64_t index;
  if (a.dx_vectors != DgradVectors::kNone) {
    if (coord.locate(a, coord.pixel(TileCoord<T>::item_pixel(channels, item, 0)), a.dx_stride, &index))
      store4_from_float(dx + index, 0, kTypeOf<Element>, make_float4(v[0], v[1], v[2], v[3]));
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (coord.locate(a, coord.pixel(j), a.dx_stride, &index)) store_from_float(dx + index, 0, kTypeOf<Element>, v[j]);
}

// Four bits: which of the four are NaN or infinite.
__device__ __forceinline__ uint32_t non_finite(float4 const& v) {
  return !isfinite(v.x) | !isfinite(v.y) << 1 | !isfinite(v.z) << 2 | !isfinite(v.w) << 3;
}

// Computes those of the thread's outputs by the rule that `repairs` names, four bits an item. Few threads ever come
// here.
template <class T>
__device__ __noinline__ void repair(DgradArgs const& a, DgradConfig const& config, uint32_t repairs) {
  TileCoord<T> const coord(a, config, blockIdx.x);
  bool const channels = a.dx_vectors == DgradVectors::kChannels;
  for (; repairs != 0; repairs &= repairs - 1) {
    int32_t const bit = __ffs(repairs) - 1, c = coord.channel(TileCoord<T>::item_channel(channels, bit / 4, bit % 4));
    int32_t n, i, j;
    if (c >= coord.end_c ||
        !coord.locate(a, coord.pixel(TileCoord<T>::item_pixel(channels, bit / 4, bit % 4)), &n, &i, &j))
      continue;
    int32_t const y = coord.h.phase + i * a.h.stride, x = coord.w.phase + j * a.w.stride;
    store_from_float(a.dx, dx_index(a, n, c, y, x), a.dx_type, dgrad_exact<false>(a, n, c, y, x));
  }
}

// ---- tile

// x of the thread's outputs, not converted where it is float32. Where there is no output, some other element of x.
template <class T, typename Element>
__device__ __forceinline__ void load_x(DgradArgs const& a, TileCoord<T> const& coord,
                                       float (&x)[T::kThreadC][T::kThreadHW], Element) {
  auto const* const base = static_cast<std::conditional_t<sizeof(Element) == 4, float, uint16_t> const*>(a.p.x);
  constexpr int32_t kType = kTypeOf<Element>;
  auto const one = [&](int64_t index) {
    if constexpr (sizeof(Element) == 4) {
      return __ldg(base + index);
    } else {
      return bits_as_float(__ldg(base + index), kType);
    }
  };
  auto const four = [&](int64_t index) {
    if constexpr (sizeof(Element) == 4) {
      return __ldg(reinterpret_cast<float4 const*>(base + index));
    } else {
      uint2 const v = __ldg(reinterpret_cast<uint2 const*>(base + index));
      return make_float4(bits_as_float(v.x & 0xffff, kType), bits_as_float(v.x >> 16, kType),
                         bits_as_float(v.y & 0xffff, kType), bits_as_float(v.y >> 16, kType));
    }
  };
  auto const channel = [&](int32_t i) {
    int32_t const c = coord.channel(i);
    return (c < coord.end_c ? c : coord.first_c) * a.p.x_stride[1];
  };
  int64_t index[T::kThreadHW];
  coord.locate(a, coord.pixel(0), a.p.x_stride, &index[0]);
  if (a.x_vectors == DgradVectors::kPixels) {
#pragma unroll
    for (int i = 0; i < T::kThreadC; ++i) {
      float4 const v = four(index[0] + channel(i));
      x[i][0] = v.x;
      x[i][1] = v.y;
      x[i][2] = v.z;
      x[i][3] = v.w;
    }
    return;
  }
#pragma unroll
  for (int j = 1; j < T::kThreadHW; ++j) coord.locate(a, coord.pixel(j), a.p.x_stride, &index[j]);
  if (a.x_vectors == DgradVectors::kChannels) {
#pragma unroll
    for (int i = 0; i < T::kThreadC; i += 4) {
      int64_t const offset = channel(i);
#pragma unroll
      for (int j = 0; j < T::kThreadHW; ++j) {
        float4 const v = four(index[j] + offset);
        x[i][j] = v.x;
        x[i + 1][j] = v.y;
        x[i + 2][j] = v.z;
        x[i + 3][j] = v.w;
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < T::kThreadC; ++i) {
    int64_t const offset = channel(i);
#pragma unroll
    for (int j = 0; j < T::kThreadHW; ++j) x[i][j] = one(index[j] + offset);
  }
}

// Keeps a value in its register: the compiler would otherwise compute it again from the thread's index in every slice.
__device__ __forceinline__ void keep(int32_t* v) { asm volatile("" : "+r"(*v)); }

__device__ __forceinline__ void add_row(float (*sum)[4], float4 const& v) {
  (*sum)[0] += v.x;
  (*sum)[1] += v.y;
  (*sum)[2] += v.z;
  (*sum)[3] += v.w;
}

// Accumulates slices first .. last - 1 of one tile: acc[channel][pixel] = sum(dy * sat(w' - x')), dy_sum[pixel] =
// sum(dy).
template <class T, Fill kFill>
__device__ __forceinline__ void accumulate(DgradArgs const& a, DgradConfig const& config, TileCoord<T> const& coord,
                                           int32_t first, int32_t last, Smem<T, kFill>& smem,
                                           float (&x)[T::kThreadC][T::kThreadHW],
                                           float (&acc)[T::kThreadC][T::kThreadHW], float (&dy_sum)[T::kThreadHW]) {
  with_type(a.p.x_type, [&](auto element) { load_x<T>(a, coord, x, element); });
  Loader<T, kFill> loader(a, config, smem, coord, first);
  if constexpr (kFill != Fill::kPixels) __syncthreads();  // windows
  wait_for_primary();
  int32_t fill_stage = 0, filled = first;
  auto fill = [&] {
    if (filled < last) loader.fill(smem.stage[fill_stage]);
    ++filled;
    fill_stage = fill_stage + 1 == T::kStages ? 0 : fill_stage + 1;
    copy_commit();  // an empty group keeps the count that copy_wait relies on
  };
  for (int i = 0; i < T::kStages - 1; ++i) fill();
  Packed const packed(a, config, T::kTileC, T::kTileK);
  float const* const marks = packed.marks + (int64_t{coord.group} * config.tiles_k + coord.tile_c) * packed.blocks;
  bool marked = false;
  for (int32_t i = threadIdx.x; i < packed.blocks; i += T::kThreads) marked |= marks[i] != 0.f;
  float const shift = __syncthreads_or(marked) ? NAN : -0.5f;
#pragma unroll
  for (int i = 0; i < T::kThreadC; ++i)
#pragma unroll
    for (int j = 0; j < T::kThreadHW; ++j) x[i][j] = fmaf(0.5f, x[i][j], shift);

  float w_frag[2][T::kThreadC], dy_frag[2][T::kThreadHW];
  auto load = [&](float const* w_smem, float const* dy_smem, int buffer) {
    *reinterpret_cast<float4*>(&w_frag[buffer][0]) = *reinterpret_cast<float4 const*>(w_smem);
    *reinterpret_cast<float4*>(&w_frag[buffer][4]) = *reinterpret_cast<float4 const*>(w_smem + T::kTileC / 2);
    *reinterpret_cast<float4*>(&dy_frag[buffer][0]) = *reinterpret_cast<float4 const*>(dy_smem);
  };
  // The last filters of a group may be few.
  int32_t const last_slices = (ceil_div(a.Kg, T::kTileK) - 1) * coord.h.taps * coord.w.taps;
  int32_t thread_c = coord.thread_c, thread_hw = coord.thread_hw;
  int32_t share = coord.row * (T::kTileK / T::kRows) * T::kPitchHW + thread_hw;  // of dy, whose sums it adds
  keep(&thread_c);
  keep(&thread_hw);
  keep(&share);

  int32_t stage = 0;
  for (int32_t slice = first; slice < last; ++slice) {
    copy_wait<T::kStages - 2>();
    __syncthreads();
    float const* const dy_stage = smem.stage[stage] + T::kTileK * T::kPitchC;
    float const* w_smem = smem.stage[stage] + thread_c;
    float const* dy_smem = dy_stage + thread_hw;
    stage = stage + 1 == T::kStages ? 0 : stage + 1;
    load(w_smem, dy_smem, 0);
    fill();
#pragma unroll
    for (int i = 0; i < T::kTileK / T::kRows; ++i)  // the thread's share
      add_row(&dy_sum, *reinterpret_cast<float4 const*>(dy_stage + share + i * T::kPitchHW));
    int32_t terms = slice >= last_slices ? config.last_terms : T::kTileK;
#pragma unroll 1
    do {
      terms -= kUnroll;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        // The fragments of the next term are on their way while this one is added. After the slice's last term lies
        // what is being filled: terms that are there already are read again.
        if (u + 1 < kUnroll) {
          load(w_smem + (u + 1) * T::kPitchC, dy_smem + (u + 1) * T::kPitchHW, (u + 1) % 2);
        } else {
          if (terms > 0) {
            w_smem += kUnroll * T::kPitchC;
            dy_smem += kUnroll * T::kPitchHW;
          }
          load(w_smem, dy_smem, 0);
        }
#pragma unroll
        for (int i = 0; i < T::kThreadC; ++i)
#pragma unroll
          for (int j = 0; j < T::kThreadHW; ++j)
            acc[i][j] = fmaf(dy_frag[u % 2][j], __saturatef(w_frag[u % 2][i] - x[i][j]), acc[i][j]);
      }
    } while (terms > 0);
  }

  // The shares of the sums of dy meet: in a warp, then, in order, those of the warps with the same pixels.
#pragma unroll
  for (int lanes = T::kLanesHW; lanes < 32; lanes *= 2)
#pragma unroll
    for (int j = 0; j < T::kThreadHW; ++j) dy_sum[j] += __shfl_xor_sync(0xffffffff, dy_sum[j], lanes);
  if constexpr (T::kWarpsC > 1) {
    copy_wait<0>();
    __syncthreads();
    float* const rows = smem.stage[0] + coord.thread_hw;
    int32_t const warp = coord.row / T::kLanesC;
    if (coord.row % T::kLanesC == 0)
      *reinterpret_cast<float4*>(rows + warp * T::kTileHW) = make_float4(dy_sum[0], dy_sum[1], dy_sum[2], dy_sum[3]);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < T::kThreadHW; ++j) dy_sum[j] = 0.f;
#pragma unroll
    for (int row = 0; row < T::kWarpsC; ++row)
      add_row(&dy_sum, *reinterpret_cast<float4 const*>(rows + row * T::kTileHW));
  }
}

// ---- kernels

template <class T>
__device__ __forceinline__ float4* partial_sum(DgradArgs const& a, DgradConfig const& config, int32_t split,
                                               int32_t item) {
  int64_t const index = ((int64_t{split} * config.tiles + blockIdx.x) * T::kItems + item) * T::kThreads + threadIdx.x;
  return reinterpret_cast<float4*>(static_cast<char*>(a.p.workspace) + config.packed_bytes) + index;
}

template <class T, Fill kFill>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSM)
    adder2d_dgrad_simt_kernel(__grid_constant__ DgradArgs const a, __grid_constant__ DgradConfig const config) {
  extern __shared__ __align__(16) unsigned char smem_bytes[];
  launch_dependents();
  TileCoord<T> const coord(a, config, blockIdx.x);
  int32_t const slices = ceil_div(a.Kg, T::kTileK) * coord.h.taps * coord.w.taps;
  int32_t first = 0, last = slices;
  if (config.splits > 1) {
    int32_t const split = blockIdx.y, share = slices / config.splits, rest = slices - share * config.splits;
    first = split * share + min(split, rest);
    last = first + share + (split < rest);
  }
  float x[T::kThreadC][T::kThreadHW], acc[T::kThreadC][T::kThreadHW] = {}, dy_sum[T::kThreadHW] = {};
  accumulate<T, kFill>(a, config, coord, first, last, *reinterpret_cast<Smem<T, kFill>*>(smem_bytes), x, acc, dy_sum);

  bool finite = true;
#pragma unroll
  for (int i = 0; i < T::kThreadC; ++i)
#pragma unroll
    for (int j = 0; j < T::kThreadHW; ++j) {
      acc[i][j] = fmaf(0.f, x[i][j], fmaf(2.f, acc[i][j], -dy_sum[j]));
      finite &= isfinite(acc[i][j]);
    }

  bool const channels = a.dx_vectors == DgradVectors::kChannels;
  auto const item_of = [&](bool by_channels, int item) {
    int const i = item / 4 * 4, j = item % 4;
    return by_channels ? make_float4(acc[i][j], acc[i + 1][j], acc[i + 2][j], acc[i + 3][j])
                       : make_float4(acc[item][0], acc[item][1], acc[item][2], acc[item][3]);
  };
  if (config.splits > 1) {
    float4* const sums = partial_sum<T>(a, config, blockIdx.y, 0);
#pragma unroll
    for (int item = 0; item < T::kItems; ++item) sums[item * T::kThreads] = item_of(channels, item);
    return;
  }
  with_type(a.dx_type, [&](auto element) { store_tile<decltype(element)>(a, coord, acc); });
  if (finite) return;
  uint32_t repairs = 0;
#pragma unroll
  for (int item = 0; item < T::kItems; ++item) repairs |= non_finite(item_of(channels, item)) << 4 * item;
  repair<T>(a, config, repairs);
}

// Adds the splits of item blockIdx.y of tile blockIdx.x, in order, so that results repeat exactly.
template <class T>
__global__ void __launch_bounds__(T::kThreads)
    adder2d_dgrad_reduce_kernel(__grid_constant__ DgradArgs const a, __grid_constant__ DgradConfig const config) {
  TileCoord<T> const coord(a, config, blockIdx.x);
  int32_t const item = blockIdx.y;
  float4 const* const sums = partial_sum<T>(a, config, 0, item);
  int64_t const step = int64_t{config.tiles} * T::kItems * T::kThreads;  // from split to split
  wait_for_primary();
  float sum[4] = {};
#pragma unroll 8
  for (int32_t split = 0; split < config.splits; ++split) add_row(&sum, sums[split * step]);
  with_type(a.dx_type, [&](auto element) { store_item<decltype(element)>(a, coord, item, sum); });
  uint32_t const repairs = non_finite(make_float4(sum[0], sum[1], sum[2], sum[3]));
  if (repairs != 0) repair<T>(a, config, repairs << 4 * item);
}

// ---- launcher

// Sets the shared memory that a block allocates, so that a multiprocessor runs no more blocks than suit their number.
// The main kernel starts while the one that packs still runs, where blocks come to lie as they find room: 392 blocks on
// 132 multiprocessors that take four would be four here and two there, and take a third longer than three everywhere.
void spread_blocks(DgradConfig* config) {
  constexpr int32_t kMost = kArch.dgrad_blocks, kFewest = kArch.dgrad_fewest_blocks;
  int32_t const available = smem_per_multiprocessor();
  int32_t const share = ceil_div(config->tiles * config->splits, multiprocessor_count());
  int32_t best = kMost;
  for (int32_t blocks_per_sm = kMost - 1; blocks_per_sm >= kFewest; --blocks_per_sm)
    if (ceil_div(share, blocks_per_sm) * blocks_per_sm < ceil_div(share, best) * best) best = blocks_per_sm;
  auto const least = [&](int32_t blocks_per_sm) {
    return blocks_per_sm == kMost ? 0 : available / (blocks_per_sm + 1) - kArch.smem_reserved + 128;
  };
  config->least_smem_bytes = least(best);
  config->most_smem_bytes = least(kFewest);
}

template <class T, Fill kFill>
cudaError_t launch_tile(DgradArgs const& args, DgradConfig const& config, cudaStream_t stream) {
  auto const kernel = adder2d_dgrad_simt_kernel<T, kFill>;
  constexpr int32_t kSmemBytes = sizeof(Smem<T, kFill>);
  int32_t const smem_bytes = std::max(kSmemBytes, config.least_smem_bytes);
  // As much for every such plan: else a thread could lower what another one is about to launch with.
  cudaError_t error =
      allow_smem(kernel, config.least_smem_bytes == 0 ? kSmemBytes : std::max(kSmemBytes, config.most_smem_bytes));
  if (error != cudaSuccess) return error;
  int32_t const pack_blocks = Packed(args, config, T::kTileC, T::kTileK).blocks * config.tiles_k * args.p.groups;
  error = launch(adder2d_dgrad_pack_kernel<T>, dim3(pack_blocks), dim3(Packed::kThreads), 0, stream, args, config);
  if (error != cudaSuccess) return error;
  error =
      launch_dependent(kernel, dim3(config.tiles, config.splits), dim3(T::kThreads), smem_bytes, stream, args, config);
  if (error != cudaSuccess || config.splits == 1) return error;
  return launch_dependent(adder2d_dgrad_reduce_kernel<T>, dim3(config.tiles, T::kItems), dim3(T::kThreads), 0, stream,
                          args, config);
}

using Tile128x32 = Tile<128, 32, 32, 2>;
using Tile64x64 = Tile<64, 64, 32, 2>;
using Tile32x128 = Tile<32, 128, 32, 2>;
using Tile16x256 = Tile<16, 256, 16, 2>;

template <class T>
constexpr TileSize kSizeOf{T::kTileC, T::kTileHW, T::kTileK, kArch.dgrad_hiding_blocks, kArch.dgrad_rate};
// In the order of launch_dgrad_simt.
constexpr TileSize kTiles[] = {kSizeOf<Tile64x64>, kSizeOf<Tile128x32>, kSizeOf<Tile32x128>, kSizeOf<Tile16x256>};
constexpr int32_t kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);
constexpr char const* kTileNames[] = {"64x64", "128x32", "32x128", "16x256"};  // channels x pixels
static_assert(sizeof(kTileNames) / sizeof(kTileNames[0]) == kTileCount, "one name a tile");

template <class T>
cudaError_t launch_any_fill(DgradArgs const& args, DgradConfig const& config, cudaStream_t stream) {
  if (is_16_bit(args.p.y_type)) return launch_tile<T, Fill::kConvert>(args, config, stream);
  bool const filters = args.p.y_stride[1] == 1 && args.p.y_stride[3] != 1;
  return filters ? launch_tile<T, Fill::kFilters>(args, config, stream)
                 : launch_tile<T, Fill::kPixels>(args, config, stream);
}

}  // namespace

bool plan_dgrad_simt(DgradArgs const& args, size_t split_bytes, TileForce const& force, DgradConfig* plan) {
  // Each phase is a group with the pixels of one phase; its share of the taps is taken to be the average.
  int32_t const phases = args.h.phases * args.w.phases;
  TileProblem const problem{args.Cg, args.NIJ, args.p.groups * phases,
                            static_cast<int32_t>(int64_t{args.Kg} * args.p.R * args.p.S / phases)};
  double cycles;
  DgradConfig& config = *plan;
  config = {choose_tile(problem, kTiles, kTileCount, SplitReduce::kAllOrNone, split_bytes, force, &cycles)};
  if (cycles == 0) return false;
  config.last_terms = args.Kg - (ceil_div(args.Kg, kTiles[config.tile].c) - 1) * kTiles[config.tile].c;
  config.last_terms = ceil_div(config.last_terms, kUnroll) * kUnroll;
  config.div_tiles_c = FastDiv(config.tiles_k);
  config.div_tiles_hw = FastDiv(config.tiles_pq);
  config.packed_bytes = Packed(args, config, kTiles[config.tile].k, kTiles[config.tile].c).bytes(args, config);
  config.workspace_bytes += config.packed_bytes;
  spread_blocks(&config);
  return true;
}

cudaError_t launch_dgrad_simt(DgradArgs const& args, DgradConfig const& config, cudaStream_t stream) {
  switch (config.tile) {
    case 0: return launch_any_fill<Tile64x64>(args, config, stream);
    case 1: return launch_any_fill<Tile128x32>(args, config, stream);
    case 2: return launch_any_fill<Tile32x128>(args, config, stream);
    case 3: return launch_any_fill<Tile16x256>(args, config, stream);
  }
  return cudaErrorInvalidValue;
}

FamilyNames const kDgradSimt{"simt", kTileNames, kTileCount};

}  // namespace adder2d
