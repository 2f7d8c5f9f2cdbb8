// What the kernels need of a GPU that C++ lacks: each piece of PTX behind an inline function. With GRPO_EMULATED the
// same functions come from tests/cuda_emulator, and g++ compiles the kernels for a CPU.
#pragma once

#include <stdint.h>

#if defined(GRPO_EMULATED)
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define GRPO_KERNEL __global__ void
#define GRPO_DEVICE __device__ __forceinline__
#define GRPO_BOUNDS(threads) __launch_bounds__(threads, 1)
#define GRPO_PARAMETERS const __grid_constant__

namespace port {

using Stream = cudaStream_t;
constexpr bool kEmulated = false;

GRPO_DEVICE int thread_index() { return threadIdx.x; }
GRPO_DEVICE int block_index() { return blockIdx.x; }

// A block's shared memory; aligned for bulk copies.
template <class Layout>
GRPO_DEVICE Layout& shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return *reinterpret_cast<Layout*>(memory);
}
GRPO_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
// Of the same place in another block of the cluster.
GRPO_DEVICE uint32_t address_at(const void* p, int rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(p)), "r"(rank));
  return there;
}

GRPO_DEVICE void sync_block() { __syncthreads(); }
GRPO_DEVICE void sync_warp() { __syncwarp(); }
// Its barriers are of whole warps, whatever way their lanes came.
GRPO_DEVICE void sync_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

template <class V>
GRPO_DEVICE V shuffle(V value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class V>
GRPO_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// An mbarrier: a phase ends when all arrivals are in and all announced bytes have landed.
struct Barrier {
  uint64_t state;

  GRPO_DEVICE void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
  }
  GRPO_DEVICE void arrive() {
    asm volatile(
        "{\n\t.reg .b64 state;\n\tmbarrier.arrive.shared::cta.b64 state, [%0];\n\t}" ::"r"(shared_address(this))
        : "memory");
  }
  // At another block's copy of this barrier, which sees what this thread has done before.
  GRPO_DEVICE void arrive_at(int rank) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(address_at(this, rank))
                 : "memory");
  }
  // Bytes that must land before the phase ends; the caller has yet to arrive.
  GRPO_DEVICE void expect(int bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
  }
  // For the end of the phase of that parity, by all lanes of a warp. They leave together: one that asked again after
  // another had gone on could find the phase after the next.
  GRPO_DEVICE void wait(unsigned parity) { wait_until<false>(parity); }
  // The same, and what other blocks of the cluster sent is visible.
  GRPO_DEVICE void wait_for_cluster(unsigned parity) { wait_until<true>(parity); }

 private:
#define GRPO_TRY_WAIT(scope)                                                   \
  asm volatile("{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.acquire." scope \
               ".shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"   \
               : "=r"(ended)                                                   \
               : "r"(address), "r"(parity)                                     \
               : "memory")
  template <bool kCluster>
  GRPO_DEVICE void wait_until(unsigned parity) {
    const uint32_t address = shared_address(this);
    uint32_t ended = 0;
    while (!ended) {
      if constexpr (kCluster) {
        GRPO_TRY_WAIT("cluster");
      } else {
        GRPO_TRY_WAIT("cta");
      }
    }
    __syncwarp();
  }
#undef GRPO_TRY_WAIT
};

// Makes initialised barriers visible to bulk copies and to the cluster.
GRPO_DEVICE void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Orders this thread's accesses to shared memory before bulk copies of it.
GRPO_DEVICE void fence_for_bulk() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Both ends and the size are multiples of 16 bytes. `landed` gets the bytes.
GRPO_DEVICE void bulk_load(void* to, const void* from, int bytes, Barrier& landed) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(&landed))
               : "memory");
}
GRPO_DEVICE void bulk_store(void* to, const void* from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(to)),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
// Closes a group of this thread's stores.
GRPO_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until the sources of all but the last kPending groups have been read.
template <int kPending>
GRPO_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// 16 bytes into a block's copy of `slot`; its copy of `landed` gets them. Of a cluster of two blocks or more: alone, a
// block may not.
GRPO_DEVICE void send(int rank, void* slot, const uint32_t (&words)[4], Barrier& landed) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   address_at(slot, rank)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(address_at(&landed, rank))
               : "memory");
}

// Largest relative error 2^-22.5; results below 2^-126 are 0.
GRPO_DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
GRPO_DEVICE double exp2_of(double x) { return exp2(x); }
GRPO_DEVICE float fma_of(float a, float b, float c) { return __fmaf_rn(a, b, c); }
GRPO_DEVICE double fma_of(double a, double b, double c) { return __fma_rn(a, b, c); }
GRPO_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
GRPO_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }

// 16 bytes of shared memory, at a multiple of 16.
struct alignas(16) Words {
  uint32_t word[4];
};
GRPO_DEVICE Words load_words(const void* p) { return *static_cast<const Words*>(p); }
GRPO_DEVICE void store_words(void* p, const Words& words) { *static_cast<Words*>(p) = words; }

// 32 bits from the middle of 64.
GRPO_DEVICE uint32_t shifted(uint32_t low, uint32_t high, int bits) { return __funnelshift_r(low, high, bits); }

GRPO_DEVICE uint32_t bfloat16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
GRPO_DEVICE uint32_t float16_pair(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
GRPO_DEVICE void float16_unpair(uint32_t bits, float& low, float& high) {
  const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&bits));
  low = pair.x;
  high = pair.y;
}

// Every function below returns the runtime's error, 0 for none.
inline int checked(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();  // the next call is not to find it
  return error;
}
inline const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }
inline int use_device(int index) { return checked(cudaSetDevice(index)); }

inline int allow(const void* kernel, int cluster, int shared_bytes) {
  const int error = checked(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  if (error || cluster <= 8) return error;
  return checked(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
}

// Puts a kernel on the device, which otherwise its first launch would do; and the local memory of its threads.
inline int load(const void* kernel, int shared_bytes, int32_t& local_bytes) {
  cudaFuncAttributes attributes;
  if (const int error = checked(cudaFuncGetAttributes(&attributes, kernel))) return error;
  local_bytes = int32_t(attributes.localSizeBytes);
  return allow(kernel, 1, shared_bytes);
}

// A launch of `blocks` blocks in clusters; `attribute` must outlive the configuration.
inline cudaLaunchConfig_t configuration(int blocks, int cluster, int threads, int shared_bytes, Stream stream,
                                        cudaLaunchAttribute& attribute) {
  attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return config;
}

template <class Parameters>
int launch(void (*kernel)(Parameters), int blocks, int cluster, int threads, int shared_bytes, Stream stream,
           const Parameters& parameters) {
  if (const int error = allow(reinterpret_cast<const void*>(kernel), cluster, shared_bytes)) return error;
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = configuration(blocks, cluster, threads, shared_bytes, stream, attribute);
  return checked(cudaLaunchKernelEx(&config, kernel, parameters));
}

// How many clusters of such blocks run at once.
template <class Parameters>
int clusters_at_once(void (*kernel)(Parameters), int cluster, int threads, int shared_bytes, int32_t& found) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (const int error = allow(function, cluster, shared_bytes)) return error;
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = configuration(cluster, cluster, threads, shared_bytes, nullptr, attribute);
  int count = 0;
  const int error = checked(cudaOccupancyMaxActiveClusters(&count, function, &config));
  found = count;
  return error;
}

// All of GrpoCudaDevice but its clusters.
template <class Device>
int describe(int index, Device& device) {
  if (const int error = checked(cudaDriverGetVersion(&device.driver))) return error;
  if (const int error = checked(cudaRuntimeGetVersion(&device.runtime))) return error;
  const struct {
    cudaDeviceAttr attribute;
    int32_t* value;
  } asked[] = {{cudaDevAttrComputeCapabilityMajor, &device.major},
               {cudaDevAttrComputeCapabilityMinor, &device.minor},
               {cudaDevAttrMaxSharedMemoryPerBlockOptin, &device.shared_bytes}};
  for (const auto& one : asked)
    if (const int error = checked(cudaDeviceGetAttribute(one.value, one.attribute, index))) return error;
  return 0;
}

}  // namespace port
#endif
