// The contract of the adder2d operator: problem description and C entry points.
//
//   y[n,k,p,q] = b[k] - sum over c,r,s of | x[n, g*Cg + c, h, w] - w[k,c,r,s] |
//
// with h = p*stride_h - pad_h + r*dil_h, w = q*stride_w - pad_w + s*dil_w, Cg = C / groups and g = k / (K / groups).
// Taps in the padding read x = 0 and contribute |w|. AdderNet: Do We Really Need Multiplications in Deep Learning?
// (CVPR 2020, arXiv 1912.13200), equation 2.
//
// PyTorch (through ctypes) and the TensorRT plugin are two callers of the same functions. This header knows
// neither of them; it includes nothing but the C integer types, so that the plugin compiles without CUDA headers.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum Adder2dType : int32_t {
  ADDER2D_FLOAT32 = 0,
  ADDER2D_FLOAT16 = 1,
  ADDER2D_BFLOAT16 = 2,
} Adder2dType;

// What becomes of a sum before it is stored, in float32:
//
//   y = clamp(scale[k] * (b[k] - sum) + shift[k] + residual[n,k,p,q], lower, upper)
//
// BatchNorm, a residual sum and ReLU after the layer, without another pass over y. A NaN stays a NaN, as in torch.relu
// and torch.clamp. Device pointers, but for adder2d_fprop_cpu, which reads host memory and a float32 residual only.
typedef struct Adder2dEpilogue {
  float const* scale;          // [K], or null for 1
  float const* shift;          // [K], or null for 0
  void const* residual;        // [N, K, P, Q], or null; it may be y where it has y's strides and type
  int64_t residual_stride[4];  // elements between neighbours along N, K, P, Q
  int32_t residual_type;       // Adder2dType
  int32_t reserved;            // 0
  float lower, upper;          // -INFINITY and INFINITY where there is no limit
} Adder2dEpilogue;

// All sizes are in elements. Sums are float32 whatever the types. `x_type` and `y_type` are free of each other and of
// `w_type`: TensorRT hands float32 weights to a float16 layer.
typedef struct Adder2dParams {
  int32_t N, C, H, W;  // x: input  [N, C, H, W]
  int32_t K, R, S;     // w: weight [K, C / groups, R, S], contiguous
  int32_t P, Q;        // y: output [N, K, P, Q], P and Q from adder2d_output_size
  int32_t stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups;
  int32_t x_type, w_type, y_type;  // Adder2dType; the bias has w_type
  int32_t reserved;                // 0
  int64_t x_stride[4];             // elements between neighbours along N, C, H, W
  int64_t y_stride[4];             // elements between neighbours along N, K, P, Q
  void const* x;
  void const* w;
  void const* b;  // bias [K], or null
  void* y;
  void* workspace;                  // device memory, 16-byte aligned, or null
  size_t workspace_bytes;           // bytes at `workspace`
  Adder2dEpilogue const* epilogue;  // host memory, read during the call; null for y = b - sum. Forward pass only
  void const* packed_w;             // device memory, 16-byte aligned: w as adder2d_pack_weights_cpu packs it, or null
} Adder2dParams;

// sizeof(Adder2dParams): a caller that declares the struct by itself checks its own declaration with this.
__attribute__((visibility("default"))) size_t adder2d_params_size(void);

// Why `params` is not a valid problem, as one sentence naming the value, or null where it is valid. Pointers are
// not looked at. The text lives until the next call on the same thread. A valid problem has tensors of fewer than 2^58
// elements and strides that reach no further, so that no offset in elements or bytes leaves an int64.
__attribute__((visibility("default"))) char const* adder2d_check(Adder2dParams const* params);

// Bytes of device workspace that adder2d_fprop wants for this problem on the current device (0 where it wants none).
__attribute__((visibility("default"))) size_t adder2d_fprop_workspace(Adder2dParams const* params);

// Enqueues y = adder2d(x, w) + b on `stream` (a cudaStream_t) of the current device. Any workspace will do, none too;
// below adder2d_fprop_workspace it is slower. Returns a cudaError_t, 0 for success; invalid params give
// cudaErrorInvalidValue (1) and enqueue nothing. Never synchronises or allocates; may be captured into a CUDA graph.
__attribute__((visibility("default"))) int32_t adder2d_fprop(Adder2dParams const* params, void* stream);

// Weights that are packed once, for layers of float16 and bfloat16 input: adder2d_fprop then need not pack them at each
// call, and with float16 input in channels_last of a multiple of 8 channels a group it launches one kernel only.
// adder2d_packed_weight_bytes tells their size, 0 where no kernel of this layer reads such weights:
//
//   2 * groups * ceil(R * S * ceil(C / groups / 8) / 4) * 32 * ceil(K / groups / 64) * 64 bytes
//
// adder2d_pack_weights_cpu writes so much to `packed` (host memory) from `w` (host memory, of any w_type); copied to
// the device, at an address that is a multiple of 16, it is Adder2dParams::packed_w. Kernels still read `w` itself for
// sums that float16 cannot hold. The bytes depend on w and on C, K, R, S, groups and w_type, on no other size, nor on
// the device. Returns 0 for success, 1 for invalid params, null pointers or a layer of size 0.
__attribute__((visibility("default"))) size_t adder2d_packed_weight_bytes(Adder2dParams const* params);
__attribute__((visibility("default"))) int32_t adder2d_pack_weights_cpu(Adder2dParams const* params, void* packed);

// The kernel that adder2d_fprop chooses for this problem on the current device (of several launches, the first one), as
// "family:tile" or "family:tile:splits:full_tiles:packed": e.g. "simt:64x128:3:132:unpacked", tiles of 64 filters by
// 128 pixels, of which the first 132 are whole and the others split in three along the reduction. Null where there is
// none: for invalid params, an empty batch, or a forced kernel that cannot implement the problem. The text lives until
// the next call on the same thread.
__attribute__((visibility("default"))) char const* adder2d_fprop_describe(Adder2dParams const* params);

// For tests and measurements: all later calls in this process use one kernel. `choice` has the form that
// adder2d_fprop_describe returns; fields that are missing or empty ("simt", "simt:64x128", "half::3") are chosen
// automatically. Null or "" ends it. Returns null for success; where the text is not a valid choice, returns one
// sentence that says why, and changes nothing. A problem that the kernel does not support, or not with the given
// workspace, then gives cudaErrorNotSupported (801). Call adder2d_fprop_workspace again after a change: it depends on
// the kernel.
__attribute__((visibility("default"))) char const* adder2d_fprop_force(char const* choice);

// The text of a cudaError_t returned above.
__attribute__((visibility("default"))) char const* adder2d_error_string(int32_t error);

// The same operator on the CPU: all types ADDER2D_FLOAT32, host pointers, on `threads` threads at most (below 1 means
// 1, and more than a few for each core are not used), workspace unused. Returns 0 for success, 1 for invalid params, 2
// where memory is short, 3 where the environment asks for an unknown instruction set. Defined in cpu/adder2d_cpu.cpp.
__attribute__((visibility("default"))) int32_t adder2d_fprop_cpu(Adder2dParams const* params, int32_t threads);

// The text of a result of adder2d_fprop_cpu or adder2d_dgrad_cpu.
__attribute__((visibility("default"))) char const* adder2d_cpu_error_string(int32_t error);

// The gradient of the input, by the rule of AdderNet, which is not the derivative:
//
//   dx[n,c,h,w] = sum over k,r,s of dy[n,k,p,q] * clamp(w[k,c,r,s] - x[n,c,h,w], -1, 1)
//
// over the k and (r,s) whose windows at p, q read x[n,c,h,w].
typedef struct Adder2dDgradParams {
  Adder2dParams layer;   // the forward problem with dy in the place of y (y, y_type, y_stride); b is not used
  int32_t dx_type;       // Adder2dType
  int32_t reserved;      // 0
  int64_t dx_stride[4];  // elements between neighbours along N, C, H, W
  void* dx;              // [N, C, H, W]; it overlaps no input
} Adder2dDgradParams;

// sizeof(Adder2dDgradParams)
__attribute__((visibility("default"))) size_t adder2d_dgrad_params_size(void);

// As their namesakes of the forward pass.
__attribute__((visibility("default"))) char const* adder2d_dgrad_check(Adder2dDgradParams const* params);
__attribute__((visibility("default"))) size_t adder2d_dgrad_workspace(Adder2dDgradParams const* params);
__attribute__((visibility("default"))) int32_t adder2d_dgrad(Adder2dDgradParams const* params, void* stream);
__attribute__((visibility("default"))) char const* adder2d_dgrad_describe(Adder2dDgradParams const* params);
__attribute__((visibility("default"))) char const* adder2d_dgrad_force(char const* choice);
__attribute__((visibility("default"))) int32_t adder2d_dgrad_cpu(Adder2dDgradParams const* params, int32_t threads);

// The gradient of the weight, by the rule of AdderNet:
//
//   dw[k,c,r,s] = sum over n,p,q of dy[n,k,p,q] * (x - w[k,c,r,s])
//               = convolved[k,c,r,s] - w[k,c,r,s] * sum over n,p,q of dy[n,k,p,q]
//
// where `convolved` is the weight gradient of a convolution with the same x, dy and geometry, the caller's or our own;
// and with eta > 0 then dw * eta * sqrt(number of weights) / max(|dw|, 1e-12), |dw| being the Euclidean norm of all of
// it.
typedef struct Adder2dWgradParams {
  Adder2dParams layer;          // the forward problem with dy in the place of y (y, y_type, y_stride); b is not used
  int32_t channels_last;        // w and dw are contiguous as [K, C / groups, R, S] (0) or as [K, R, S, C / groups] (1)
  int32_t reserved;             // 0
  int64_t convolved_stride[4];  // elements between neighbours along K, C / groups, R, S
  double eta;                   // 0 for no scaling
  float const* convolved;       // or null, where adder2d_wgrad_takes says so; with it x is not read
  float* dw;                    // may be convolved where that lies in memory as dw does
} Adder2dWgradParams;

// sizeof(Adder2dWgradParams)
__attribute__((visibility("default"))) size_t adder2d_wgrad_params_size(void);

// Whether adder2d_wgrad computes this problem without `convolved` on the current device: 3x3 layers with few channels,
// where it is faster than a convolution. It depends on nothing but the geometry.
__attribute__((visibility("default"))) int32_t adder2d_wgrad_takes(Adder2dWgradParams const* params);

// As adder2d_check, adder2d_fprop_workspace and adder2d_fprop, but for the workspace, with or without `convolved`,
// which this one needs: with a smaller one it returns cudaErrorInvalidValue (1).
__attribute__((visibility("default"))) char const* adder2d_wgrad_check(Adder2dWgradParams const* params);
__attribute__((visibility("default"))) size_t adder2d_wgrad_workspace(Adder2dWgradParams const* params);
__attribute__((visibility("default"))) int32_t adder2d_wgrad(Adder2dWgradParams const* params, void* stream);

// As adder2d_fprop_describe and adder2d_fprop_force. "convolved" stands for the kernels that need `convolved`,
// "simt:tile" for the one that does not; adder2d_wgrad_takes then tells whether the forced one can do without it.
__attribute__((visibility("default"))) char const* adder2d_wgrad_describe(Adder2dWgradParams const* params);
__attribute__((visibility("default"))) char const* adder2d_wgrad_force(char const* choice);

// Number of output positions along one axis; below 1 where the kernel does not fit.
static inline int64_t adder2d_output_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  int64_t const room = size + 2 * pad - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

#ifdef __cplusplus
}  // extern "C"
#endif
