// CUDA's language and the few runtime calls that csrc/cuda uses, on a host compiler: blocks one after another in random order, the
// threads of a block as fibers that run from barrier to barrier in random order. Shared memory is NaN when a block starts;
// asynchronous copies arrive now or as late as their wait allows. build.py rewrites launches, shared arrays and by-value batches.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };

namespace on_host {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024;

struct Copy {
  void* to;
  const void* from;
  size_t bytes, zeros;  // the last `zeros` of `bytes` are filled with 0
  void run() const {
    std::memcpy(to, from, bytes - zeros);
    std::memset(static_cast<char*>(to) + bytes - zeros, 0, zeros);
  }
};

enum class State : uint8_t { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {
  ucontext_t start;
  jmp_buf here;
  void* stack = nullptr;
  bool started = false;
  State state = State::done;
  std::vector<std::vector<Copy>> copies;  // committed groups, oldest first; the last is open
};

struct Machine {  // one block at a time
  std::vector<Fiber> fibers;
  std::vector<int> ready;
  int live = 0, waiting = 0, current = 0;
  int warp_waiting[64] = {};
  unsigned char slots[64][kWarp][16];  // what the lanes of a warp exchange
  dim3 block, grid, block_size;
  std::vector<unsigned char> dynamic;
  std::vector<std::pair<void*, size_t>> shared;  // every __shared__ array met so far
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  jmp_buf scheduler;
  uint64_t random = 1;
  const char* failure = nullptr;
  int64_t launches = 0;

  uint32_t draw(uint32_t below) {
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    return static_cast<uint32_t>(random >> 11) % below;
  }
};

extern Machine machine;

inline void stop(const char* why) {  // ends the block: fibers are never unwound
  machine.failure = why;
  _longjmp(machine.scheduler, 2);
}

inline void pause() {
  Fiber& fiber = machine.fibers[machine.current];
  if (_setjmp(fiber.here) == 0) _longjmp(machine.scheduler, 1);
}

inline int warp_size_of(int warp) {
  const int size = static_cast<int>(machine.fibers.size());
  return std::min(kWarp, size - warp * kWarp);
}

inline void release(int begin, int end, State from) {
  for (int i = begin; i < end; ++i) {
    if (machine.fibers[i].state != from) continue;
    machine.fibers[i].state = State::ready;
    machine.ready.push_back(i);
  }
}

inline void block_barrier() {
  machine.fibers[machine.current].state = State::at_block_barrier;
  if (++machine.waiting == static_cast<int>(machine.fibers.size())) {
    machine.waiting = 0;
    release(0, static_cast<int>(machine.fibers.size()), State::at_block_barrier);
  }
  pause();
}

inline void warp_barrier() {
  const int warp = machine.current / kWarp;
  machine.fibers[machine.current].state = State::at_warp_barrier;
  if (++machine.warp_waiting[warp] == warp_size_of(warp)) {
    machine.warp_waiting[warp] = 0;
    release(warp * kWarp, warp * kWarp + warp_size_of(warp), State::at_warp_barrier);
  }
  pause();
}

inline void enter() {
  machine.body(machine.argument);
  Fiber& fiber = machine.fibers[machine.current];
  for (auto& group : fiber.copies) {
    for (const Copy& copy : group) copy.run();
  }
  fiber.state = State::done;
  --machine.live;
  _longjmp(machine.scheduler, 1);
}

inline void start(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    fiber.stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fiber.stack == MAP_FAILED) throw std::bad_alloc();
  }
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack;
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  fiber.started = false;
  fiber.state = State::ready;
  fiber.copies.assign(1, {});
}

inline void run_block() {
  const int threads = static_cast<int>(machine.block_size.x);
  machine.fibers.resize(threads);
  machine.ready.clear();
  for (int i = 0; i < threads; ++i) {
    start(machine.fibers[i]);
    machine.ready.push_back(i);
  }
  machine.live = threads;
  machine.waiting = 0;
  std::fill(std::begin(machine.warp_waiting), std::end(machine.warp_waiting), 0);
  for (auto [data, bytes] : machine.shared) std::memset(data, 0xff, bytes);
  std::fill(machine.dynamic.begin(), machine.dynamic.end(), 0xff);
  while (machine.live > 0) {
    if (machine.ready.empty()) {
      machine.failure = "threads wait at a barrier that others have left or never reach";
      return;
    }
    const uint32_t chosen = machine.draw(static_cast<uint32_t>(machine.ready.size()));
    machine.current = machine.ready[chosen];
    machine.ready[chosen] = machine.ready.back();
    machine.ready.pop_back();
    const int why = _setjmp(machine.scheduler);
    if (why == 2) return;
    if (why == 0) {
      Fiber& fiber = machine.fibers[machine.current];
      if (fiber.started) _longjmp(fiber.here, 1);
      fiber.started = true;
      setcontext(&fiber.start);
    }
  }
}

struct Config {
  dim3 grid, block;
  size_t dynamic = 0;
  void* stream = nullptr;
};

template <class... P, class... A>
void run(const Config& config, void (*kernel)(P...), const A&... arguments) {
  std::tuple<const std::remove_cvref_t<P>...> held(arguments...);  // converted once, as a launch does
  auto call = [&] { std::apply(kernel, held); };
  machine.argument = &call;
  machine.body = [](void* argument) { (*static_cast<decltype(call)*>(argument))(); };
  machine.grid = config.grid, machine.block_size = config.block;
  machine.dynamic.resize(config.dynamic + 128);
  ++machine.launches;
  std::vector<std::pair<unsigned, unsigned>> blocks;
  for (unsigned y = 0; y < config.grid.y; ++y) {
    for (unsigned x = 0; x < config.grid.x; ++x) blocks.emplace_back(x, y);
  }
  for (size_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[machine.draw(static_cast<uint32_t>(i))]);
  for (auto [x, y] : blocks) {
    machine.block = dim3(x, y);
    run_block();
    if (machine.failure != nullptr) {
      const std::string why = machine.failure;
      machine.failure = nullptr;
      throw std::runtime_error("CUDA on the host: " + why);
    }
  }
}

// The one array of a `__shared__` declaration; `T` is the array type, `Tag` the declaration.
template <class T, class Tag>
T& shared() {
  alignas(128) static T storage;
  static const bool known = [] {
    std::memset(&storage, 0xff, sizeof(T));
    machine.shared.emplace_back(&storage, sizeof(T));
    return true;
  }();
  (void)known;
  return storage;
}

inline unsigned char* dynamic_shared() {
  auto at = reinterpret_cast<uintptr_t>(machine.dynamic.data());
  return reinterpret_cast<unsigned char*>((at + 127) / 128 * 128);
}

struct Index {
  unsigned x, y, z;
};
inline Index thread_index() { return {static_cast<unsigned>(machine.current), 0, 0}; }

template <class T>
T shuffle_xor(T value, int lanes) {
  static_assert(sizeof(T) <= 16);
  const int warp = machine.current / kWarp, lane = machine.current % kWarp;
  std::memcpy(machine.slots[warp][lane], &value, sizeof(T));
  warp_barrier();
  T other;
  std::memcpy(&other, machine.slots[warp][lane ^ lanes], sizeof(T));
  warp_barrier();
  return other;
}

}  // namespace on_host

#define threadIdx (::on_host::thread_index())
#define blockIdx (::on_host::machine.block)
#define blockDim (::on_host::machine.block_size)
#define gridDim (::on_host::machine.grid)

inline void __syncthreads() { ::on_host::block_barrier(); }
inline void __syncwarp(unsigned = ~0u) { ::on_host::warp_barrier(); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  if (mask != ~0u) ::on_host::stop("a shuffle names less than the whole warp, which is not emulated");
  return ::on_host::shuffle_xor(value, lanes);
}

// Runtime calls
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline const char* cudaGetErrorString(cudaError_t) { return "success"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 3, cudaSuccess; }
template <class K>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* resident, K, int, size_t) {
  return *resident = 2, cudaSuccess;  // six blocks are resident: longer lists make them stride
}
template <class K>
cudaError_t cudaFuncSetAttribute(K, cudaFuncAttribute, int) { return cudaSuccess; }

// bfloat16
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline __nv_bfloat16 __float2bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

// Asynchronous copies
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    ::on_host::stop("an asynchronous copy is not aligned to its size");
  }
  const ::on_host::Copy copy{to, from, bytes, zeros};
  if (::on_host::machine.draw(2) == 0) return copy.run();
  std::memset(to, 0xff, bytes);  // not to be read before its wait
  ::on_host::machine.fibers[::on_host::machine.current].copies.back().push_back(copy);
}
inline void __pipeline_commit() { ::on_host::machine.fibers[::on_host::machine.current].copies.emplace_back(); }
inline void __pipeline_wait_prior(size_t left) {
  auto& groups = ::on_host::machine.fibers[::on_host::machine.current].copies;
  const size_t committed = groups.size() - 1;
  const size_t done = committed > left ? committed - left : 0;
  for (size_t i = 0; i < done; ++i) {
    for (const auto& copy : groups[i]) copy.run();
  }
  groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(done));
}

// Matrix fragments: a warp's first lane holds and computes the whole 16×16 tile; all lanes must come together.
namespace nvcuda::wmma {
struct row_major {};
struct col_major {};
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
enum layout_t { mem_row_major };

template <class Use, int M, int N, int K, class T, class Layout = row_major>
struct fragment {
  float x[16][16];  // a: [m][k], b: [k][n], accumulator: [m][n]
};

template <class F>
void whole_warp(F&& work) {
  ::on_host::warp_barrier();
  if (::on_host::machine.current % ::on_host::kWarp == 0) work();
  ::on_host::warp_barrier();
}

template <class Use, class T, class Layout>
void fill_fragment(fragment<Use, 16, 16, 16, T, Layout>& to, float value) {
  for (auto& row : to.x) std::fill(std::begin(row), std::end(row), value);
}

template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& to, const T* from, unsigned pitch) {
  if (reinterpret_cast<uintptr_t>(from) % 32 != 0 || pitch * sizeof(T) % 16 != 0) {
    ::on_host::stop("a fragment is not aligned to 256 bits, or its pitch to 16 bytes");
  }
  whole_warp([&] {
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) {
        const T value = std::is_same_v<Layout, row_major> ? from[i * pitch + j] : from[j * pitch + i];
        to.x[i][j] = __bfloat162float(value);
      }
    }
  });
}

template <class A, class B, class T>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& d, const fragment<matrix_a, 16, 16, 16, T, A>& a,
              const fragment<matrix_b, 16, 16, 16, T, B>& b, const fragment<accumulator, 16, 16, 16, float>& c) {
  whole_warp([&] {
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) {
        double sum = c.x[i][j];
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(a.x[i][k]) * b.x[k][j];
        d.x[i][j] = static_cast<float>(sum);
      }
    }
  });
}

inline void store_matrix_sync(float* to, const fragment<accumulator, 16, 16, 16, float>& from, unsigned pitch, layout_t) {
  if (reinterpret_cast<uintptr_t>(to) % 32 != 0 || pitch * sizeof(float) % 16 != 0) {
    ::on_host::stop("a fragment is not aligned to 256 bits, or its pitch to 16 bytes");
  }
  whole_warp([&] {
    for (int i = 0; i < 16; ++i) std::copy(from.x[i], from.x[i] + 16, to + i * pitch);
  });
}
}  // namespace nvcuda::wmma
