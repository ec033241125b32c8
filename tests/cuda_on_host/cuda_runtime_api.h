// CUDA on the host, as far as csrc/cuda uses it: the threads of a block are fibers that take turns, block after block.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <vector>

#define __device__
#define __global__ static
#define __forceinline__ inline
#define __shared__ static

using std::min;

enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = struct Stream*;
constexpr int CUDART_VERSION = 0;

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 3, cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  return memset(memory, value, bytes), cudaSuccess;
}
inline int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }
inline int atomicAdd(int* counter, int more) { return (*counter += more) - more; }

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

constexpr unsigned kWarp = 32;

struct Barrier {
  unsigned arrived = 0;
  unsigned generation = 0;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[1 << 16]};
  bool done = false;
};

struct Block {
  std::vector<Thread> threads;
  ucontext_t scheduler;
  Barrier all;
  std::vector<Barrier> warps;
  std::vector<double> slots;
};

inline Block* block;

template <typename Kernel>
struct Launch {
  unsigned grid, threads;
  Kernel kernel;

  template <typename... Arguments>
  void operator()(Arguments... arguments) const {
    const auto body = [&] { kernel(arguments...); };
    using Body = decltype(body);
    static const Body* current;
    current = &body;
    gridDim.x = grid;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) {
      Block here;
      here.threads = std::vector<Thread>(threads);
      here.warps.resize(threads / kWarp);
      here.slots.resize(threads);
      block = &here;
      for (Thread& thread : here.threads) {
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = 1 << 16;
        thread.context.uc_link = &here.scheduler;
        makecontext(
            &thread.context,
            +[] {
              (*current)();
              block->threads[threadIdx.x].done = true;
            },
            0);
      }
      for (unsigned left = threads; left;) {
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) {
          Thread& thread = here.threads[threadIdx.x];
          if (!thread.done) {
            swapcontext(&here.scheduler, &thread.context);
            left -= thread.done;
          }
        }
      }
    }
  }
};

template <typename Kernel>
Launch<Kernel> launch(unsigned grid, unsigned threads, int, cudaStream_t, Kernel kernel) {
  return {grid, threads, kernel};
}

inline void wait(Barrier& barrier, unsigned threads) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) {
    const unsigned self = threadIdx.x;
    swapcontext(&block->threads[self].context, &block->scheduler);
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::block->all, blockDim.x); }

inline void __syncwarp() {
  emulated::wait(emulated::block->warps[threadIdx.x / emulated::kWarp], emulated::kWarp);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  emulated::block->slots[threadIdx.x] = value;
  __syncwarp();
  const T other = T(emulated::block->slots[threadIdx.x ^ unsigned(mask)]);
  __syncwarp();
  return other;
}
