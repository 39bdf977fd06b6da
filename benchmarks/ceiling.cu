// The rate at which this GPU accumulates |x - w| when nothing else has to be done: the limit kernels are held against.
//
// An accumulated term is two additions, d = x - w and acc = acc + |d|, in float32 or in half pairs. How close a loop of
// them comes to two issue slots a term depends on the registers' banks, the loop's size and the number of warps, so
// several probes are timed and the best one counts. ceiling.py compiles this file and calls the functions at its end.
//
// No compiler may shorten the probes: inputs come from memory, and every difference has an operand that changed since
// the last time. The result is clamped to [0, 1], a free modifier of the addition, so that values stay finite.
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <algorithm>

namespace {

constexpr int kThreads = 128;
constexpr int kInputs = 1 << 14;  // floats in [0, 1) that a probe may start from

// ---- one term

template <class T>
constexpr int kLanes = 1;  // terms of one register
template <>
constexpr int kLanes<__half2> = 2;

__device__ __forceinline__ void set(float& a, float const* in) { a = *in; }
__device__ __forceinline__ void set(__half2& a, float const* in) { a = __floats2half2_rn(in[0], in[1]); }
__device__ __forceinline__ float get(float a) { return a; }
__device__ __forceinline__ float get(__half2 a) { return __low2float(a) + __high2float(a); }

__device__ __forceinline__ void accumulate(float& acc, float x, float w, bool subtract) {
  float const d = fabsf(x - w);
  acc = __saturatef(subtract ? acc - d : acc + d);
}
__device__ __forceinline__ void accumulate(__half2& acc, __half2 x, __half2 w, bool subtract) {
  __half2 const d = __habs2(__hsub2(x, w));
  acc = subtract ? __hsub2_sat(acc, d) : __hadd2_sat(acc, d);
}

// ---- probes

struct Clock {
  long long cycles, nanoseconds;
};

__device__ __forceinline__ Clock now() {
  Clock t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t.nanoseconds));
  t.cycles = clock64();
  return t;
}

template <class T, int kRows, int kColumns>
__device__ __forceinline__ void finish(T const (&acc)[kRows][kColumns], Clock const& start, float* out, Clock* clock) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    Clock const end = now();
    *clock = {end.cycles - start.cycles, end.nanoseconds - start.nanoseconds};
  }
  float sum = 0.f;
  for (auto const& row : acc)
    for (T const& value : row) sum += get(value);
  if (sum == -1.f) *out = sum;  // never, which the compiler does not know
}

// Registers only: each row of accumulators in turn is the x of all the other rows.
template <class T, int kRows, int kColumns, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    registers(float const* in, int iterations, float* out, Clock* clock) {
  T w[kRows], acc[kRows][kColumns];
  for (int i = 0; i < kRows; ++i) {
    set(w[i], in + threadIdx.x + i * kThreads);
    for (int j = 0; j < kColumns; ++j) set(acc[i][j], in + threadIdx.x + (kRows + i * kColumns + j) * kThreads);
  }
  Clock const start = now();
#pragma unroll 1
  for (int iteration = 0; iteration < iterations; ++iteration) {
#pragma unroll
    for (int x = 0; x < kRows; ++x)
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
          if (i != x) accumulate(acc[i][j], acc[x][j], w[i], x % 2);
  }
  finish(acc, start, out, clock);
}

__device__ __forceinline__ void load4(uint32_t (&to)[8], int at, uint32_t address) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[at]), "=r"(to[at + 1]), "=r"(to[at + 2]), "=r"(to[at + 3])
               : "r"(address));
}

// As in a matrix product: 8 x 8 accumulators, x and w of every step from shared memory: 4 reads of 16 bytes, 64 terms.
template <class T, int kUnroll, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks) shared(float const* in, int iterations, float* out, Clock* clock) {
  constexpr int kSteps = 16;
  __shared__ __align__(16) T x_smem[kSteps][128];
  __shared__ __align__(16) T w_smem[kSteps][64];
  for (int i = threadIdx.x; i < kSteps * 128; i += kThreads) set(x_smem[0][i], in + i);
  for (int i = threadIdx.x; i < kSteps * 64; i += kThreads) set(w_smem[0][i], in + kSteps * 128 + i);
  T acc[8][8];
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) set(acc[i][j], in + threadIdx.x + (i * 8 + j) * kThreads);
  __syncthreads();
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t const x_row = __cvta_generic_to_shared(&x_smem[0][(warp / 2 * 8 + lane % 8) * 4]);
  uint32_t const w_row = __cvta_generic_to_shared(&w_smem[0][(warp % 2 * 4 + lane / 8) * 4]);
  Clock const start = now();
#pragma unroll 1
  for (int iteration = 0; iteration < iterations; ++iteration) {
    uint32_t const first = iteration * kUnroll % kSteps;
#pragma unroll
    for (int step = 0; step < kUnroll; ++step) {
      uint32_t x[8], w[8];
      load4(x, 0, x_row + (first + step) * sizeof(x_smem[0]));
      load4(x, 4, x_row + (first + step) * sizeof(x_smem[0]) + 64 * sizeof(T));
      load4(w, 0, w_row + (first + step) * sizeof(w_smem[0]));
      load4(w, 4, w_row + (first + step) * sizeof(w_smem[0]) + 32 * sizeof(T));
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j)
          accumulate(acc[i][j], reinterpret_cast<T const&>(x[j]), reinterpret_cast<T const&>(w[i]), step % 2);
    }
  }
  finish(acc, start, out, clock);
}

// ---- table

using Kernel = void (*)(float const*, int, float*, Clock*);

struct Probe {
  char const* name;
  int half;    // 1 for half pairs
  int blocks;  // on one multiprocessor
  int terms;   // of one thread and iteration
  Kernel kernel;
};

template <class T, int kRows, int kColumns, int kBlocks>
constexpr Probe from_registers(char const* name) {
  constexpr int kTerms = kRows * (kRows - 1) * kColumns * kLanes<T>;
  return {name, kLanes<T> == 2, kBlocks, kTerms, registers<T, kRows, kColumns, kBlocks>};
}
template <class T, int kUnroll, int kBlocks>
constexpr Probe from_shared(char const* name) {
  return {name, kLanes<T> == 2, kBlocks, kUnroll * 64 * kLanes<T>, shared<T, kUnroll, kBlocks>};
}

// Small loops fit the innermost instruction cache, more warps hide more; which mixture wins is for the GPU to say.
constexpr Probe kProbes[] = {
    from_registers<float, 8, 8, 2>("registers 8x8, 2 blocks"),
    from_registers<float, 8, 8, 3>("registers 8x8, 3 blocks"),
    from_registers<float, 8, 8, 4>("registers 8x8, 4 blocks"),
    from_registers<float, 4, 16, 3>("registers 4x16, 3 blocks"),
    from_registers<float, 4, 16, 4>("registers 4x16, 4 blocks"),
    from_registers<float, 4, 8, 4>("registers 4x8, 4 blocks"),
    from_registers<float, 4, 8, 8>("registers 4x8, 8 blocks"),
    from_registers<float, 2, 32, 4>("registers 2x32, 4 blocks"),
    from_registers<float, 2, 16, 8>("registers 2x16, 8 blocks"),
    from_shared<float, 2, 3>("shared 8x8, 2 steps, 3 blocks"),
    from_shared<float, 4, 3>("shared 8x8, 4 steps, 3 blocks"),
    from_shared<float, 4, 4>("shared 8x8, 4 steps, 4 blocks"),
    from_registers<__half2, 8, 8, 3>("registers 8x8, 3 blocks"),
    from_registers<__half2, 8, 8, 4>("registers 8x8, 4 blocks"),
    from_registers<__half2, 4, 16, 4>("registers 4x16, 4 blocks"),
    from_registers<__half2, 4, 8, 8>("registers 4x8, 8 blocks"),
    from_registers<__half2, 2, 32, 4>("registers 2x32, 4 blocks"),
    from_registers<__half2, 2, 16, 8>("registers 2x16, 8 blocks"),
    from_shared<__half2, 2, 3>("shared 8x8, 2 steps, 3 blocks"),
    from_shared<__half2, 4, 3>("shared 8x8, 4 steps, 3 blocks"),
};
constexpr int kProbeCount = sizeof(kProbes) / sizeof(kProbes[0]);

// ---- measurement

struct Buffers {
  float *in = nullptr, *out = nullptr;
  Clock* clock = nullptr;
  cudaEvent_t start = nullptr, end = nullptr;

  ~Buffers() {
    cudaFree(in);
    cudaFree(out);
    cudaFree(clock);
    if (start != nullptr) cudaEventDestroy(start);
    if (end != nullptr) cudaEventDestroy(end);
  }
};

constexpr int kRuns = 7;
constexpr double kCycles = 2e6;  // of one run: a millisecond, beside which launch and first loads vanish

cudaError_t measure(Probe const& probe, double* terms_per_second, double* megahertz) {
#define TRY(call) \
  if (cudaError_t const error = (call); error != cudaSuccess) return error
  int device = 0, multiprocessors = 0, smem = 0, reserved = 0, smem_block = 0, resident = 0;
  TRY(cudaGetDevice(&device));
  TRY(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  TRY(cudaDeviceGetAttribute(&smem, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  TRY(cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device));
  TRY(cudaDeviceGetAttribute(&smem_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  // Unused shared memory keeps further blocks away, so that every multiprocessor gets the same number.
  cudaFuncAttributes attributes;
  TRY(cudaFuncGetAttributes(&attributes, probe.kernel));
  int const used = static_cast<int>(attributes.sharedSizeBytes);
  int const unused = std::max(0, std::min(smem / probe.blocks - reserved, smem_block) - used) & ~255;
  TRY(cudaFuncSetAttribute(probe.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, unused));
  TRY(cudaFuncSetAttribute(probe.kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100));
  TRY(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, probe.kernel, kThreads, unused));
  int const blocks = multiprocessors * std::max(1, std::min(resident, probe.blocks));

  Buffers b;
  TRY(cudaMalloc(&b.in, kInputs * sizeof(float)));
  TRY(cudaMalloc(&b.out, sizeof(float)));
  TRY(cudaMalloc(&b.clock, sizeof(Clock)));
  TRY(cudaEventCreate(&b.start));
  TRY(cudaEventCreate(&b.end));
  static float host[kInputs];
  uint32_t state = 1;
  for (float& value : host) value = static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-24f;
  TRY(cudaMemcpy(b.in, host, sizeof(host), cudaMemcpyHostToDevice));

  double const slots = 2.0 * probe.terms / (probe.half ? 2 : 1) * blocks / multiprocessors;  // cycles of one iteration
  int const iterations = static_cast<int>(kCycles / slots) + 1;
  double const terms = static_cast<double>(probe.terms) * iterations * blocks * kThreads;
  double rates[kRuns], clocks[kRuns];
  for (int run = -1; run < kRuns; ++run) {  // the first one does not count
    TRY(cudaEventRecord(b.start));
    probe.kernel<<<blocks, kThreads, unused>>>(b.in, iterations, b.out, b.clock);
    TRY(cudaGetLastError());
    TRY(cudaEventRecord(b.end));
    TRY(cudaEventSynchronize(b.end));
    float milliseconds = 0.f;
    Clock clock;
    TRY(cudaEventElapsedTime(&milliseconds, b.start, b.end));
    TRY(cudaMemcpy(&clock, b.clock, sizeof(clock), cudaMemcpyDeviceToHost));
    if (run < 0) continue;
    rates[run] = terms / milliseconds * 1e3;
    clocks[run] = clock.nanoseconds > 0 ? 1e3 * clock.cycles / clock.nanoseconds : 0;
  }
#undef TRY
  std::nth_element(rates, rates + kRuns / 2, rates + kRuns);
  std::nth_element(clocks, clocks + kRuns / 2, clocks + kRuns);
  *terms_per_second = rates[kRuns / 2];
  *megahertz = clocks[kRuns / 2];
  return cudaSuccess;
}

}  // namespace

// ---- entry points

extern "C" int ceiling_count() { return kProbeCount; }
extern "C" char const* ceiling_name(int probe) { return kProbes[probe].name; }
extern "C" int ceiling_is_half(int probe) { return kProbes[probe].half; }

// Runs a probe on the current device: the median of its rates, and the multiprocessors' clock meanwhile. Returns null,
// or the text of an error.
extern "C" char const* ceiling_measure(int probe, double* terms_per_second, double* megahertz) {
  cudaError_t const error = measure(kProbes[probe], terms_per_second, megahertz);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
