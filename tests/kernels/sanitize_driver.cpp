// Runs every operation of the CPU kernels on exactly allocated, misaligned, empty, tiny and odd buffers in every format, with
// values from denormal to Inf and NaN; built with sanitizers by tools/sanitize.sh.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>

#include "../../csrc/cpu/eigenbasis.h"
#include "../../csrc/cpu/kron.h"
#include "../../csrc/cpu/multi_tensor.h"
#include "../../csrc/cpu/orthogonalize.h"
#include "../../csrc/cpu/teams.h"
#include "../../csrc/include/chunks.h"

using namespace megatron_opt;

namespace {

std::mt19937 random_bits(7);

int64_t draw(int64_t below) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(below)); }

int64_t width(Format format) { return format == Format::f32 ? 4 : format == Format::bf16 ? 2 : 1; }

float value() {
  constexpr float scales[] = {1.0f, 1e-40f, 1e-20f, 1e30f, 0.0f, INFINITY, NAN};
  const float x = static_cast<float>(static_cast<int32_t>(random_bits())) * 0x1p-31f;
  return x * scales[draw(20) < 14 ? 0 : draw(7)];
}

using Memory = std::vector<std::unique_ptr<unsigned char[]>>;

// A tensor of exactly `numel` elements that ends where its allocation ends, at any element-aligned address.
void* allocate(Memory& memory, Format format, int64_t numel) {
  const int64_t skipped = draw(9);
  memory.push_back(std::make_unique<unsigned char[]>(static_cast<size_t>((numel + skipped) * width(format))));
  unsigned char* start = memory.back().get() + skipped * width(format);
  for (int64_t i = 0; i < numel; ++i) {
    if (format == Format::f32) reinterpret_cast<float*>(start)[i] = value();
    if (format == Format::bf16) reinterpret_cast<uint16_t*>(start)[i] = float_to_bf16(value());
    if (format >= Format::signed8) start[i] = static_cast<unsigned char>(draw(249));
  }
  return start;
}

TensorEntry make_piece(Memory& memory) {
  constexpr int64_t sizes[] = {0, 1, 3, 17, 2047, 2048, 2049, 5000, 70000};
  TensorEntry entry{};
  entry.numel = sizes[draw(9)];
  entry.first = static_cast<uint64_t>(draw(1 << 30)) << draw(8);
  for (int slot = kParam; slot < kSlots; ++slot) {
    Format format = draw(2) != 0 ? Format::f32 : Format::bf16;
    if (slot == kState0 && draw(3) == 0) format = Format::signed8;
    if (slot == kState1 && draw(3) == 0) format = Format::unsigned8;
    entry.format[slot] = slot == kCopy ? Format::bf16 : format;
    entry.data[slot] = allocate(memory, entry.format[slot], entry.numel);
    if (format >= Format::signed8) {
      entry.absmax[slot] = static_cast<float*>(allocate(memory, Format::f32, blocks_of(entry.numel)));
    }
  }
  return entry;
}

// Products and orthogonalizations of exactly allocated matrices, row-major and transposed, symmetric and not.
int matrix_calls() {
  if (!has_products()) return 0;
  constexpr int64_t sides[] = {1, 2, 11, 12, 13, 31, 32, 33, 65, 100};
  constexpr Step simple{3.4445f, -4.7750f, 2.0315f};
  int calls = 0;
  for (int round = 0; round < 60; ++round, calls += 3) {
    Memory memory;
    const int64_t m = sides[draw(10)], n = sides[draw(10)], k = sides[draw(10)];
    const bool a_transposed = draw(2) != 0, b_transposed = draw(2) != 0;
    float* a = static_cast<float*>(allocate(memory, Format::f32, m * k));
    float* b = static_cast<float*>(allocate(memory, Format::f32, k * n));
    float* c = static_cast<float*>(allocate(memory, Format::f32, m * n));
    float* square = static_cast<float*>(allocate(memory, Format::f32, m * m));
    const int threads = 1 + static_cast<int>(draw(3));
    run_products({Product<float>{a, b, draw(2) != 0 ? c : nullptr, c, a_transposed ? m : k, b_transposed ? k : n, n, n, m, n,
                                 k, 1.0f, 0.5f, b_transposed, false}},
                 a_transposed, threads);
    run_products({Product<float>{a, a, nullptr, square, k, k, 0, m, m, m, k, 1.0f, 0.0f, true, true}}, false, threads);
    const NewtonSchulz settings{std::vector<Step>(5, simple), 1e-5, draw(2) != 0, has_bf16_products() && draw(2) != 0,
                                1 + static_cast<int>(draw(3))};
    orthogonalize_cpu(settings, {{a, c, m, std::min(k, n)}, {b, c, std::min(k, m), n}}, 1);
  }
  return calls;
}

// Triangular operands and solves, Cholesky QR and the step in a basis; whatever the numbers are.
int factor_calls() {
  if (!has_products()) return 0;
  constexpr int64_t sides[] = {1, 2, 11, 12, 13, 31, 32, 33, 65, 100};
  const auto floats = [](Memory& memory, int64_t count) { return static_cast<float*>(allocate(memory, Format::f32, count)); };
  int calls = 0;
  for (int round = 0; round < 40; ++round, calls += 7) {
    Memory memory;
    const int64_t m = sides[draw(10)], n = sides[draw(10)];
    const int threads = 1 + static_cast<int>(draw(3));
    float *left = floats(memory, m * m), *right = floats(memory, n * n), *x = floats(memory, m * n), *out = floats(memory, m * n);
    const bool transposed = draw(2) != 0;
    const Triangle shape = draw(2) != 0 ? Triangle::lower : Triangle::upper;
    run_products({Product<float>{left, x, nullptr, out, m, n, 0, n, m, n, m, 1.0f, 0.0f, false, false, shape}}, false, threads);
    run_solves({Solve{left, x, out, m, transposed ? m : n, n, m, n, transposed}}, draw(2) != 0, threads);
    float* basis = floats(memory, m * m);
    if (draw(2) != 0) {
      for (int64_t i = 0; i < m * m; ++i) left[i] = 0.1f * static_cast<float>(draw(10)) + (i % (m + 1) == 0 ? 9.0f : 0.0f);
    }
    cholesky_qr_cpu(std::vector<Basis>(3, {left, basis, m}), 1e-5, 1);
    float *moment = floats(memory, m * n), *second = floats(memory, m * n);
    const Projection block{x, moment, second, draw(2) != 0 ? left : nullptr, draw(2) != 0 ? right : nullptr,
                           {draw(2) != 0 ? floats(memory, m * m) : nullptr, floats(memory, n * n)}, n, n, n, m, n};
    project_adam_cpu({0.1f, 0.9f, 0.1f, 1e-8f, 1.0f}, {0.1f, 0.9f}, {block, block}, 1);
    float *first = floats(memory, m * m), *other = floats(memory, n * n);
    for (int64_t i = 0; i < m * m; ++i) first[i] = i % (m + 1) == 0 ? 1.0f : 0.0f;
    for (int64_t i = 0; i < n * n; ++i) other[i] = right[i] = i % (n + 1) == 0 ? 1.0f + static_cast<float>(draw(3)) : 0.0f;
    kron_cpu(0.1f, std::vector<KronBlock>(2, {first, other, x, draw(2) != 0 ? out : nullptr, n, n, m, n, 0.1f}), 1);
    const bool one = draw(2) != 0;
    refresh_cpu({0.0f, 1e-7f, {1e-5, 1e-5}},
                {{moment, second, n, n, m, n, {one ? nullptr : first, other}, {one ? nullptr : left, right}}}, threads);
    kron_cpu(0.1f, {{first, other, x, out, n, n, m, n, 0.1f}}, threads);
  }
  return calls;
}

int block_calls() {
  for (int round = 0; round < 20; ++round) {
    Memory memory;
    std::vector<BlockEntry> entries;
    for (int64_t i = draw(6); i > 0; --i) {
      constexpr int64_t sizes[] = {1, 3, 64, 2049, 33000};
      const int64_t blocks = draw(5), numel = blocks * sizes[draw(5)];
      float* of[4];
      for (int k = 0; k < 4; ++k) of[k] = static_cast<float*>(allocate(memory, Format::f32, k == 2 ? blocks : numel));
      entries.push_back({of[0], of[1], of[2], of[3], numel, blocks});
    }
    block_adam_cpu({0, 0, 1, 0.9f, 0.1f, 0.98f, 0.02f, 1e-8f, 1.5f, 0, 2, 0}, entries, 1 + static_cast<int>(draw(3)));
  }
  return 20;
}

}  // namespace

int main() {
  int calls = 0;
  for (int round = 0; round < 40; ++round) {
    Memory memory;
    std::vector<TensorEntry> entries;
    for (int64_t i = draw(6); i > 0; --i) entries.push_back(make_piece(memory));
    std::vector<double> sums(3 * entries.size());
    std::vector<float> scales(2 * entries.size(), 0.5f);
    Options options{};
    options.coefficients = {1e-3f, 1e-4f, 1.0f, 0.9f, 0.1f, 0.98f, 0.02f, 1e-10f, 1.5f, 0.2f, 2.0f, 0.3f};
    options.cautious_decay = draw(2) != 0;
    options.stochastic = draw(2) != 0;
    options.scales = draw(2) != 0 ? scales.data() : nullptr;
    options.sums = draw(2) != 0 ? sums.data() : nullptr;
    options.seed = random_bits();
    options.step = static_cast<uint32_t>(round);
    for (int rule = 0; rule < 8; ++rule, ++calls) {
      update_cpu(static_cast<UpdateKind>(rule), options, entries, 1 + static_cast<int>(draw(3)));
    }
    for (int kind = 0; kind < 4; ++kind, ++calls) {
      sum_cpu(static_cast<Sum>(kind), options, entries, sums.data(), 1 + static_cast<int>(draw(3)));
    }
  }
  calls += matrix_calls() + factor_calls() + block_calls();
  std::printf("%s: %d calls\n", cpu_kernels_name(), calls);
  return 0;
}
