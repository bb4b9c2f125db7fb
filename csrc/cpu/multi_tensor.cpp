#include "multi_tensor.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "../include/chunks.h"
#include "kernels.h"

namespace megatron_opt {
namespace {

// A chunk is what a thread takes at a time and what sums are added over: it does not depend on the number of threads.
constexpr int64_t kBlocksPerChunk = 16;
constexpr int64_t kChunk = kBlocksPerChunk * kBlock;

const Kernels& chosen_kernels() {
  static const Kernels kernels = [] {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    const char* wanted = std::getenv("MEGATRON_OPT_ISA");
    const auto allowed = [&](const char* name) { return wanted == nullptr || std::strcmp(wanted, name) == 0; };
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && allowed("avx512")) {
      return avx512_kernels();
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
        allowed("avx2")) {
      return avx2_kernels();
    }
#endif
    return portable_kernels();
  }();
  return kernels;
}

// work(entry, first element, elements, chunk) over all chunks; each thread takes an equal share of consecutive ones.
template <class Work>
void for_chunks(const std::vector<TensorEntry>& entries, const std::vector<int64_t>& first, int threads, const Work& work) {
  int64_t elements = 0;
  for (const TensorEntry& entry : entries) elements += entry.numel;
  const int64_t chunks = first.back();
  const auto share = [&](int64_t begin, int64_t end) {
    int index = locate(first.data(), static_cast<int>(entries.size()), begin);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (chunk >= first[index + 1]) ++index;
      const int64_t start = (chunk - first[index]) * kChunk;
      work(index, start, std::min(kChunk, entries[index].numel - start), chunk);
    }
  };
  const int64_t shares = std::min<int64_t>({threads, chunks, elements / kChunk});  // no thread for less than a chunk
  if (chunks == 0) return;
  if (shares <= 1 || omp_in_parallel()) return share(0, chunks);
#pragma omp parallel for num_threads(static_cast<int>(shares)) schedule(static, 1)
  for (int64_t i = 0; i < shares; ++i) share(chunks * i / shares, chunks * (i + 1) / shares);
}

std::vector<int64_t> first_chunks(const std::vector<TensorEntry>& entries) {
  std::vector<int64_t> first(entries.size() + 1, 0);
  for (size_t i = 0; i < entries.size(); ++i) first[i + 1] = first[i] + (entries[i].numel + kChunk - 1) / kChunk;
  return first;
}

void add_chunks(const std::vector<int64_t>& first, const std::vector<double>& partial, double* sums) {
  for (size_t i = 0; i + 1 < first.size(); ++i) {
    for (int k = 0; k < 3; ++k) {
      double sum = 0.0;
      for (int64_t chunk = first[i]; chunk < first[i + 1]; ++chunk) sum += partial[3 * chunk + k];
      sums[3 * i + k] = sum;
    }
  }
}

}  // namespace

void update_cpu(UpdateKind kind, const Options& options, const std::vector<TensorEntry>& entries, int threads) {
  const UpdateBlock update = chosen_kernels().update[static_cast<int>(kind)];
  const std::vector<int64_t> first = first_chunks(entries);
  std::vector<double> partial(options.sums != nullptr ? 3 * first.back() : 0, 0.0);
  for_chunks(entries, first, threads, [&](int index, int64_t start, int64_t count, int64_t chunk) {
    const float scale = options.scales != nullptr ? options.scales[2 * index] : 1.0f;
    const float factor = options.scales != nullptr ? options.scales[2 * index + 1] : 1.0f;
    double* sums = options.sums != nullptr ? &partial[3 * chunk] : nullptr;
    for (int64_t at = start; at < start + count; at += kBlock) {
      update(options, entries[index], scale, factor, at, std::min(kBlock, start + count - at), sums);
    }
  });
  if (options.sums != nullptr) add_chunks(first, partial, options.sums);
}

void sum_cpu(Sum kind, const Options& options, const std::vector<TensorEntry>& entries, double* sums, int threads) {
  const SumBlock add = chosen_kernels().sum[static_cast<int>(kind)];
  const std::vector<int64_t> first = first_chunks(entries);
  std::vector<double> partial(3 * first.back(), 0.0);
  for_chunks(entries, first, threads, [&](int index, int64_t start, int64_t count, int64_t chunk) {
    for (int64_t at = start; at < start + count; at += kBlock) {
      add(options, entries[index], at, std::min(kBlock, start + count - at), &partial[3 * chunk]);
    }
  });
  add_chunks(first, partial, sums);
}

void block_adam_cpu(const Coefficients& c, const std::vector<BlockEntry>& entries, int threads) {
  const AdamBlock adam = chosen_kernels().block_adam;
  int64_t elements = 0;
  for (const BlockEntry& entry : entries) elements += entry.numel;
  // A thread takes the blocks that start in its share of the elements.
  const auto share = [&](int64_t begin, int64_t end) {
    int64_t before = 0;
    for (const BlockEntry& entry : entries) {
      const int64_t size = entry.blocks > 0 ? entry.numel / entry.blocks : 0;
      if (size > 0) {
        const auto first_from = [&](int64_t element) {
          return std::clamp((element - before + size - 1) / size, int64_t{0}, entry.blocks);
        };
        for (int64_t b = before >= begin ? 0 : first_from(begin), last = first_from(end); b < last; ++b) {
          adam(c, entry.g + b * size, entry.m + b * size, entry.v + b, entry.u + b * size, size);
        }
      }
      before += entry.numel;
    }
  };
  const int64_t shares = std::min<int64_t>(threads, elements / kChunk);
  if (shares <= 1 || omp_in_parallel()) return share(0, elements);
#pragma omp parallel for num_threads(static_cast<int>(shares)) schedule(static, 1)
  for (int64_t i = 0; i < shares; ++i) share(elements * i / shares, elements * (i + 1) / shares);
}

const char* cpu_kernels_name() { return chosen_kernels().name; }

}  // namespace megatron_opt
