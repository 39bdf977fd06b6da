// Implicit GEMM on float32 arithmetic: filters by output pixels, reduced over (c, r, s), without an im2col in memory.
//
// A block owns a tile of kTileK filters by kTilePQ output pixels and steps through the reduction kTileC terms at a time;
// asynchronous copies fill a ring of kStages slices in shared memory while a thread accumulates its 8 x 8 outputs. One
// accumulated |x - w| is two float32 additions, so everything else in the inner loop is overhead to be kept small.
#include "fprop.h"

namespace adder2d {
namespace {

// ---- traits

// How the reduction is cut into slices, and which neighbours a warp loads together.
enum class Fill {
  kPixels,    // a slice is kTileC channels of one tap; a warp loads neighbouring pixels (NCHW)
  kChannels,  // a slice is kTileC channels of one tap; a warp loads neighbouring channels (NHWC)
  kFlat,      // a slice is kTileC terms of the flattened (c, r, s); any channel count, strides and types
};

template <int kTileK_, int kTilePQ_, int kTileC_, int kStages_>
struct Tile {
  static constexpr int kTileK = kTileK_, kTilePQ = kTilePQ_;  // outputs of a block: filters, pixels
  static constexpr int kTileC = kTileC_;                      // reduction terms of a slice
  static constexpr int kStages = kStages_;                    // slices in flight
  static constexpr int kThreadK = 8, kThreadPQ = 8;           // outputs of a thread, as 2 x 4 by 2 x 4
  static constexpr int kThreads = kTileK * kTilePQ / (kThreadK * kThreadPQ);
  static constexpr int kLanesK = kTileK >= 32 ? 4 : kTileK / kThreadK, kLanesPQ = 32 / kLanesK;  // a warp's threads
  static constexpr int kWarpsK = kTileK / (kLanesK * kThreadK);
  static constexpr int kBlocksPerSM = 3;
  // Rows of shared memory are padded by 4 floats: loads along the reduction then store to 32 different banks.
  static constexpr int kPitchK = kTileK + 4, kPitchPQ = kTilePQ + 4;
  static constexpr int kStageFloats = kTileC * (kPitchK + kPitchPQ);

  static_assert(kThreads == 128, "the fill loops are laid out for 128 threads");
  static_assert(kTileK % (kLanesK * kThreadK) == 0 && kTilePQ % (kLanesPQ * kThreadPQ) == 0, "warps must tile the block");
  static_assert(kTileC % 8 == 0 && kTileK % 16 == 0, "8 lanes load along the reduction, 16 rows at a time");
  static_assert(kTilePQ % kThreads == 0 || kThreads % kTilePQ == 0, "threads must divide the pixels evenly");
};

// One output pixel of the tile: where its window starts. An absent pixel has w0 = kOutside.
struct Pixel {
  int64_t offset;  // elements from x to the window's first tap, channel 0 of the group; may point before x
  int32_t h0, w0;
};
// One term of a flat slice. An absent term has dh = kOutside.
struct Term {
  int64_t offset;  // elements from the window's first tap
  int32_t dh, dw;
};
constexpr int32_t kOutside = INT32_MIN;  // h0 + kOutside is no row of the input, for every h0 (W likewise)

template <class T, Fill kFill>
struct Smem {
  alignas(16) float stage[T::kStages][T::kStageFloats];
  alignas(16) Pixel pixel[T::kTilePQ];
  alignas(16) Term term[kFill == Fill::kFlat ? 2 : 1][kFill == Fill::kFlat ? T::kTileC : 1];
};

// ---- fill

// Walks the slices of one tile in order. For the tap fills: channels c .. c + kTileC - 1 of tap (r, s).
struct Cursor {
  int32_t slice, c, r, s;
};

template <class T, Fill kFill>
__device__ __forceinline__ Cursor cursor_at(FpropArgs const& a, int32_t slice) {
  Cursor cursor{slice, 0, 0, 0};
  if constexpr (kFill != Fill::kFlat) {
    int32_t rs;
    cursor.c = a.div_RS.divmod(slice, &rs) * T::kTileC;
    cursor.r = a.div_S.divmod(rs, &cursor.s);
  }
  return cursor;
}

template <class T, Fill kFill>
__device__ __forceinline__ void advance(FpropArgs const& a, Cursor* cursor) {
  ++cursor->slice;
  if constexpr (kFill != Fill::kFlat) {
    if (++cursor->s < a.p.S) return;
    cursor->s = 0;
    if (++cursor->r < a.p.R) return;
    cursor->r = 0;
    cursor->c += T::kTileC;
  }
}

__device__ __forceinline__ bool inside(FpropArgs const& a, Pixel const& pixel, int32_t dh, int32_t dw) {
  return static_cast<uint32_t>(pixel.h0 + dh) < static_cast<uint32_t>(a.p.H) &&
         static_cast<uint32_t>(pixel.w0 + dw) < static_cast<uint32_t>(a.p.W);
}

// Terms of one flat slice, by the first kTileC threads; read one barrier later by fill_flat.
template <class T>
__device__ __forceinline__ void make_terms(FpropArgs const& a, int32_t slice, Term* term) {
  int32_t const lane = threadIdx.x;
  if (lane >= T::kTileC) return;
  int32_t const j = slice * T::kTileC + lane;
  Term t{0, kOutside, 0};
  if (j < a.CRS) {
    int32_t rs, s;
    int32_t const c = a.div_RS.divmod(j, &rs);
    int32_t const r = a.div_S.divmod(rs, &s);
    t.dh = r * a.p.dil_h;
    t.dw = s * a.p.dil_w;
    t.offset = c * a.p.x_stride[1] + t.dh * a.p.x_stride[2] + t.dw * a.p.x_stride[3];
  }
  term[lane] = t;
}

// Copies one element, converting unless both sides are float32 (kCast).
template <bool kCast>
__device__ __forceinline__ void copy_element(float* dst, void const* base, int64_t index, int32_t type, bool valid) {
  if constexpr (kCast) {
    *dst = valid ? load_as_float(base, index, type) : 0.f;
  } else {
    copy4_async(dst, static_cast<float const*>(base) + index, valid);
  }
}

// Weights of one slice, [kTileC][kPitchK]. A warp loads 8 terms of 4 filters.
template <class T, Fill kFill, bool kCast>
__device__ __forceinline__ void fill_w(FpropArgs const& a, Cursor const& cursor, int32_t first_k, int32_t end_k, float* w_smem) {
  int32_t const lane_c = threadIdx.x % 8, row = threadIdx.x / 8;
  int32_t const term_stride = kFill == Fill::kFlat ? 1 : a.p.R * a.p.S;
  int32_t const first = kFill == Fill::kFlat ? cursor.slice * T::kTileC : (cursor.c * a.p.R + cursor.r) * a.p.S + cursor.s;
  // For the tap fills `first` is c * R * S + r * S + s; all of kTileC channels exist.
  int64_t index = int64_t{first_k + row} * a.CRS + first + lane_c * term_stride;
#pragma unroll
  for (int k = 0; k < T::kTileK; k += 16, index += int64_t{16} * a.CRS) {
    bool const valid_k = first_k + row + k < end_k;
#pragma unroll
    for (int c = 0; c < T::kTileC; c += 8) {
      bool const valid = valid_k && (kFill != Fill::kFlat || first + c + lane_c < a.CRS);
      copy_element<kCast>(w_smem + (c + lane_c) * T::kPitchK + k + row, a.p.w, index + c * term_stride, a.p.w_type, valid);
    }
  }
}

// Pixels of one slice, [kTileC][kPitchPQ].
template <class T, Fill kFill, bool kCast>
__device__ __forceinline__ void fill_x(FpropArgs const& a, Cursor const& cursor, Pixel const* pixels, Term const* terms,
                                       float* x_smem) {
  if constexpr (kFill == Fill::kChannels) {
    int32_t const lane_c = threadIdx.x % 8, row = threadIdx.x / 8;
    int32_t const dh = cursor.r * a.p.dil_h, dw = cursor.s * a.p.dil_w;
    int64_t const offset = dh * a.p.x_stride[2] + dw * a.p.x_stride[3] + (cursor.c + lane_c) * a.p.x_stride[1];
    int64_t const step = 8 * a.p.x_stride[1];
#pragma unroll
    for (int i = 0; i < T::kTilePQ; i += 16) {
      Pixel const pixel = pixels[i + row];
      bool const valid = inside(a, pixel, dh, dw);
      int64_t index = pixel.offset + offset;
#pragma unroll
      for (int c = 0; c < T::kTileC; c += 8, index += step)
        copy_element<kCast>(x_smem + (c + lane_c) * T::kPitchPQ + i + row, a.p.x, index, a.p.x_type, valid);
    }
  } else {
    // Threads side by side take pixels side by side; with fewer pixels than threads, the rows are shared out.
    constexpr int kRows = T::kThreads > T::kTilePQ ? T::kThreads / T::kTilePQ : 1;
    int32_t const lane = threadIdx.x % T::kTilePQ, row = kRows == 1 ? 0 : threadIdx.x / T::kTilePQ;
#pragma unroll
    for (int i = 0; i < T::kTilePQ; i += T::kThreads) {
      Pixel const pixel = pixels[i + lane];
      float* dst = x_smem + row * T::kPitchPQ + i + lane;
      if constexpr (kFill == Fill::kPixels) {
        int32_t const dh = cursor.r * a.p.dil_h, dw = cursor.s * a.p.dil_w;
        bool const valid = inside(a, pixel, dh, dw);
        int64_t index = pixel.offset + dh * a.p.x_stride[2] + dw * a.p.x_stride[3] + (cursor.c + row) * a.p.x_stride[1];
        int64_t const step = kRows * a.p.x_stride[1];
#pragma unroll
        for (int c = 0; c < T::kTileC; c += kRows, index += step)
          copy_element<kCast>(dst + c * T::kPitchPQ, a.p.x, index, a.p.x_type, valid);
      } else {
#pragma unroll
        for (int c = 0; c < T::kTileC; c += kRows) {
          Term const term = terms[c + row];
          copy_element<kCast>(dst + c * T::kPitchPQ, a.p.x, pixel.offset + term.offset, a.p.x_type,
                              inside(a, pixel, term.dh, term.dw));
        }
      }
    }
  }
}

// ---- tile

// The tile's place in the output, and the place of a thread in the tile.
template <class T>
struct TileView {
  int32_t group, first_k, end_k, first_pixel;  // filters first_k .. end_k - 1 of the whole layer
  int32_t thread_k, thread_pq;                 // first output of the thread; its second half is kTileK / 2, kTilePQ / 2 on

  __device__ __forceinline__ TileView(FpropArgs const& a, FpropPlan const& plan, int32_t tile) {
    int32_t const k_tile = tile % plan.tiles_k, rest = tile / plan.tiles_k;
    group = rest / plan.tiles_pq;
    first_k = group * a.Kg + k_tile * T::kTileK;
    end_k = (group + 1) * a.Kg;
    first_pixel = rest % plan.tiles_pq * T::kTilePQ;
    int32_t const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    thread_k = (warp % T::kWarpsK * T::kLanesK + lane / T::kLanesPQ) * 4;
    thread_pq = (warp / T::kWarpsK * T::kLanesPQ + lane % T::kLanesPQ) * 4;
  }
  __device__ __forceinline__ int32_t k(int i) const { return first_k + thread_k + (i / 4) * (T::kTileK / 2) + i % 4; }
  __device__ __forceinline__ int32_t pixel(int j) const { return first_pixel + thread_pq + (j / 4) * (T::kTilePQ / 2) + j % 4; }
};

template <class T>
__device__ __forceinline__ void make_pixels(FpropArgs const& a, TileView<T> const& view, Pixel* pixels) {
  for (int i = threadIdx.x; i < T::kTilePQ; i += T::kThreads) {
    int32_t const m = view.first_pixel + i;
    Pixel pixel{0, 0, kOutside};
    if (m < a.NPQ) {
      int32_t pq, q;
      int32_t const n = a.div_PQ.divmod(m, &pq);
      int32_t const p = a.div_Q.divmod(pq, &q);
      pixel.h0 = p * a.p.stride_h - a.p.pad_h;
      pixel.w0 = q * a.p.stride_w - a.p.pad_w;
      pixel.offset = n * a.p.x_stride[0] + int64_t{view.group} * a.Cg * a.p.x_stride[1] + pixel.h0 * a.p.x_stride[2] +
                     pixel.w0 * a.p.x_stride[3];
    }
    pixels[i] = pixel;
  }
}

// Accumulates slices first .. last - 1 of one tile into acc[filter][pixel].
template <class T, Fill kFill, bool kCast>
__device__ __forceinline__ void accumulate(FpropArgs const& a, TileView<T> const& view, int32_t first, int32_t last,
                                           Smem<T, kFill>& smem, float (&acc)[T::kThreadK][T::kThreadPQ]) {
  __syncthreads();  // the tile before may still be reading
  make_pixels(a, view, smem.pixel);
  if constexpr (kFill == Fill::kFlat) make_terms<T>(a, first, smem.term[first % 2]);
  Cursor cursor = cursor_at<T, kFill>(a, first);

  auto fill = [&] {
    if (cursor.slice < last) {
      float* const stage = smem.stage[(cursor.slice - first) % T::kStages];
      fill_w<T, kFill, kCast>(a, cursor, view.first_k, view.end_k, stage);
      fill_x<T, kFill, kCast>(a, cursor, smem.pixel, smem.term[kFill == Fill::kFlat ? cursor.slice % 2 : 0],
                              stage + T::kTileC * T::kPitchK);
      advance<T, kFill>(a, &cursor);
      if constexpr (kFill == Fill::kFlat) make_terms<T>(a, cursor.slice, smem.term[cursor.slice % 2]);
    }
    copy_commit();  // an empty group keeps the count that copy_wait relies on
  };

  __syncthreads();
  for (int i = 0; i < T::kStages - 1; ++i) {
    fill();
    if constexpr (kFill == Fill::kFlat) __syncthreads();
  }
  int32_t slot = 0;
  for (int32_t slice = first; slice < last; ++slice) {
    copy_wait<T::kStages - 2>();
    __syncthreads();
    fill();
    float const* const w_smem = smem.stage[slot] + view.thread_k;
    float const* const x_smem = smem.stage[slot] + T::kTileC * T::kPitchK + view.thread_pq;
    slot = slot + 1 == T::kStages ? 0 : slot + 1;
#pragma unroll
    for (int c = 0; c < T::kTileC; ++c) {
      float w_frag[T::kThreadK], x_frag[T::kThreadPQ];
      *reinterpret_cast<float4*>(w_frag) = *reinterpret_cast<float4 const*>(w_smem + c * T::kPitchK);
      *reinterpret_cast<float4*>(w_frag + 4) = *reinterpret_cast<float4 const*>(w_smem + c * T::kPitchK + T::kTileK / 2);
      *reinterpret_cast<float4*>(x_frag) = *reinterpret_cast<float4 const*>(x_smem + c * T::kPitchPQ);
      *reinterpret_cast<float4*>(x_frag + 4) = *reinterpret_cast<float4 const*>(x_smem + c * T::kPitchPQ + T::kTilePQ / 2);
#pragma unroll
      for (int i = 0; i < T::kThreadK; ++i)
#pragma unroll
        for (int j = 0; j < T::kThreadPQ; ++j) acc[i][j] += fabsf(x_frag[j] - w_frag[i]);
    }
  }
  copy_wait<0>();
}

// Writes y = b - sum for kRows of the thread's filter rows starting at `row`; 16 bytes at a time where four of the
// thread's outputs lie side by side in y.
template <class T, int kRows>
__device__ __forceinline__ void store(FpropArgs const& a, TileView<T> const& view, int32_t row,
                                      float const (&acc)[kRows][T::kThreadPQ]) {
  bool const rows_of_4 = a.p.y_type == ADDER2D_FLOAT32 && a.p.y_stride[3] == 1 && a.p.y_stride[2] == a.p.Q &&
                         a.p.P * a.p.Q % 4 == 0 && a.p.y_stride[0] % 4 == 0 && a.p.y_stride[1] % 4 == 0 &&
                         reinterpret_cast<uintptr_t>(a.p.y) % 16 == 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int64_t offset[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      int32_t pq, q;
      int32_t const n = a.div_PQ.divmod(view.pixel(half * 4 + j), &pq);
      int32_t const p = a.div_Q.divmod(pq, &q);
      offset[j] = n * a.p.y_stride[0] + p * a.p.y_stride[2] + q * a.p.y_stride[3];
      if (rows_of_4) break;
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      int32_t const k = view.k(row + i);
      if (k >= view.end_k) continue;
      float const b = a.p.b != nullptr ? load_as_float(a.p.b, k, a.p.w_type) : -0.f;
      float y[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) y[j] = b - acc[i][half * 4 + j];
      if (rows_of_4) {
        if (view.pixel(half * 4) < a.NPQ)
          *reinterpret_cast<float4*>(static_cast<float*>(a.p.y) + offset[0] + k * a.p.y_stride[1]) =
              make_float4(y[0], y[1], y[2], y[3]);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (view.pixel(half * 4 + j) < a.NPQ) store_from_float(a.p.y, offset[j] + k * a.p.y_stride[1], a.p.y_type, y[j]);
      }
    }
  }
}

// ---- kernels

// Share of block `block`: steps [share(block), share(block + 1)) of tiles * iterations.
__device__ __forceinline__ int64_t share(FpropPlan const& plan, int32_t block) {
  return int64_t{block} * plan.tiles * plan.iterations / plan.ctas;
}
// The block whose share holds `step`.
__device__ __forceinline__ int32_t owner(FpropPlan const& plan, int64_t step) {
  int64_t const total = int64_t{plan.tiles} * plan.iterations;
  return static_cast<int32_t>(((step + 1) * plan.ctas + total - 1) / total - 1);
}
// A block leaves at most two unfinished tiles: the one that its share starts inside (0), the one that it ends inside (1).
template <class T>
__device__ __forceinline__ float4* partial_sums(FpropArgs const& a, int32_t block, int32_t which) {
  return static_cast<float4*>(a.p.workspace) + (int64_t{block} * 2 + which) * (T::kTileK * T::kTilePQ / 4) + threadIdx.x;
}

template <class T, Fill kFill, bool kCast>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSM)
    adder2d_fprop_simt_kernel(__grid_constant__ FpropArgs const a, __grid_constant__ FpropPlan const plan) {
  extern __shared__ __align__(16) unsigned char smem_bytes[];
  Smem<T, kFill>& smem = *reinterpret_cast<Smem<T, kFill>*>(smem_bytes);

  int64_t step = share(plan, blockIdx.x);
  int64_t const end = share(plan, blockIdx.x + 1);
  while (step < end) {
    int32_t const tile = static_cast<int32_t>(step / plan.iterations);
    int32_t const first = static_cast<int32_t>(step - int64_t{tile} * plan.iterations);
    int32_t const last = static_cast<int32_t>(min(int64_t{plan.iterations}, first + (end - step)));
    TileView<T> const view(a, plan, tile);
    float acc[T::kThreadK][T::kThreadPQ] = {};
    accumulate<T, kFill, kCast>(a, view, first, last, smem, acc);
    if (first == 0 && last == plan.iterations) {
      store<T, T::kThreadK>(a, view, 0, acc);
    } else {
      float4* const partial = partial_sums<T>(a, blockIdx.x, first == 0);
#pragma unroll
      for (int i = 0; i < T::kThreadK * T::kThreadPQ / 4; ++i) {
        float const* const v = &acc[i / 2][i % 2 * 4];
        partial[i * T::kThreads] = make_float4(v[0], v[1], v[2], v[3]);
      }
    }
    step += last - first;
  }
}

// Adds the partial sums of tile blockIdx.x in the order of their blocks, so that results repeat exactly.
constexpr int kReduceRows = 2;  // filter rows of one block of the grid's y

template <class T>
__global__ void __launch_bounds__(T::kThreads)
    adder2d_fprop_reduce_kernel(__grid_constant__ FpropArgs const a, __grid_constant__ FpropPlan const plan) {
  int64_t const begin = int64_t{blockIdx.x} * plan.iterations;
  int32_t const first_block = owner(plan, begin), last_block = owner(plan, begin + plan.iterations - 1);
  if (first_block == last_block) return;
  int32_t const row = blockIdx.y * kReduceRows;
  float acc[kReduceRows][T::kThreadPQ] = {};
  for (int32_t block = first_block; block <= last_block; ++block) {
    float4 const* const partial = partial_sums<T>(a, block, share(plan, block) <= begin) + row * 2 * T::kThreads;
#pragma unroll
    for (int i = 0; i < kReduceRows * T::kThreadPQ / 4; ++i) {
      float4 const v = partial[i * T::kThreads];
      float* const sum = &acc[i / 2][i % 2 * 4];
      sum[0] += v.x;
      sum[1] += v.y;
      sum[2] += v.z;
      sum[3] += v.w;
    }
  }
  store<T, kReduceRows>(a, TileView<T>(a, plan, blockIdx.x), row, acc);
}

// ---- launcher

template <class T, Fill kFill, bool kCast>
cudaError_t launch_tile(FpropArgs const& args, FpropPlan const& plan, cudaStream_t stream) {
  auto const kernel = adder2d_fprop_simt_kernel<T, kFill, kCast>;
  constexpr size_t kSmemBytes = sizeof(Smem<T, kFill>);
  if (kSmemBytes > 48 * 1024) {
    cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<plan.ctas, T::kThreads, kSmemBytes, stream>>>(args, plan);
  cudaError_t const error = cudaGetLastError();
  if (error != cudaSuccess || plan.workspace_bytes == 0) return error;
  dim3 const grid(plan.tiles, T::kThreadK / kReduceRows);
  adder2d_fprop_reduce_kernel<T><<<grid, T::kThreads, 0, stream>>>(args, plan);
  return cudaGetLastError();
}

// Wide tiles first. Their kPlan entries below must be in the order of launch_fprop_simt.
using Tile64x128 = Tile<64, 128, 16, 3>;
using Tile128x64 = Tile<128, 64, 16, 3>;
using Tile32x256 = Tile<32, 256, 8, 3>;
using Tile16x512 = Tile<16, 512, 8, 3>;

struct TileSize {
  int32_t k, pq, c;
};
template <class T>
constexpr TileSize size_of() {
  return {T::kTileK, T::kTilePQ, T::kTileC};
}
constexpr TileSize kTiles[] = {size_of<Tile64x128>(), size_of<Tile128x64>(), size_of<Tile32x256>(), size_of<Tile16x512>()};
constexpr int32_t kBlocksPerSM = 3;
constexpr int32_t kMinIterations = 4;  // a smaller share of a tile costs more than it saves

bool wants_cast(FpropArgs const& a) { return a.p.x_type != ADDER2D_FLOAT32 || a.p.w_type != ADDER2D_FLOAT32; }

Fill choose_fill(FpropArgs const& a) {
  if (wants_cast(a) || a.Cg % 16 != 0) return Fill::kFlat;
  return a.p.x_stride[1] == 1 && a.p.x_stride[3] != 1 ? Fill::kChannels : Fill::kPixels;
}

template <class T>
cudaError_t launch_any_fill(FpropArgs const& args, FpropPlan const& plan, cudaStream_t stream) {
  if (wants_cast(args)) return launch_tile<T, Fill::kFlat, true>(args, plan, stream);
  switch (choose_fill(args)) {
    case Fill::kPixels: return launch_tile<T, Fill::kPixels, false>(args, plan, stream);
    case Fill::kChannels: return launch_tile<T, Fill::kChannels, false>(args, plan, stream);
    case Fill::kFlat: return launch_tile<T, Fill::kFlat, false>(args, plan, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

FpropPlan plan_fprop_simt(FpropArgs const& args) {
  bool const flat = choose_fill(args) == Fill::kFlat;
  int64_t const slots = int64_t{multiprocessor_count()} * kBlocksPerSM;
  FpropPlan best{};
  double best_cost = 0;
  for (int32_t index = 0; index < static_cast<int32_t>(sizeof(kTiles) / sizeof(kTiles[0])); ++index) {
    TileSize const& size = kTiles[index];
    FpropPlan plan{};
    plan.tile = index;
    plan.tiles_k = ceil_div(args.Kg, size.k);
    plan.tiles_pq = ceil_div(args.NPQ, size.pq);
    plan.iterations = flat ? ceil_div(args.CRS, size.c) : args.CRS / size.c;
    int64_t const tiles = int64_t{plan.tiles_k} * plan.tiles_pq * args.p.groups;
    int64_t const total = tiles * plan.iterations;
    plan.tiles = static_cast<int32_t>(tiles);
    // Whole tiles while they fill the last wave well, equal shares of the work otherwise.
    int64_t const waves = ceil_div(tiles, slots);
    double const whole = static_cast<double>(waves * slots * plan.iterations);
    double const equal = static_cast<double>(total) * 1.03;
    int64_t ctas = tiles;
    double steps = whole;
    if (equal < whole) {
      ctas = total / kMinIterations < slots ? total / kMinIterations : slots;
      if (ctas < tiles && tiles < slots) ctas = tiles;
      if (ctas > tiles && ctas / tiles * tiles > ctas * 9 / 10) ctas = ctas / tiles * tiles;  // cut every tile alike
      steps = static_cast<double>(ceil_div(total, ctas)) * slots * 1.03;
      if (steps >= whole) {
        ctas = tiles;
        steps = whole;
      }
    }
    plan.ctas = static_cast<int32_t>(ctas);
    if (total % ctas != 0 || total / ctas % plan.iterations != 0)
      plan.workspace_bytes = static_cast<size_t>(ctas) * 2 * size.k * size.pq * sizeof(float);
    double const cost = steps * size.c * (1.0 + (size.k + size.pq) * 0.0004);
    if (index == 0 || cost < best_cost) {
      best = plan;
      best_cost = cost;
    }
  }
  return best;
}

cudaError_t launch_fprop_simt(FpropArgs const& args, FpropPlan const& plan, cudaStream_t stream) {
  switch (plan.tile) {
    case 0: return launch_any_fill<Tile64x128>(args, plan, stream);
    case 1: return launch_any_fill<Tile128x64>(args, plan, stream);
    case 2: return launch_any_fill<Tile32x256>(args, plan, stream);
    case 3: return launch_any_fill<Tile16x512>(args, plan, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace adder2d
