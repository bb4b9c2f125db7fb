// Native kernels of preconditioned steps on CPU, in eigenbases and with Kronecker factors: lists of matrices or of stacks of blocks, any of them where it lies.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cpu/eigenbasis.h"
#include "cpu/kron.h"
#include "cpu/teams.h"
#include "operators.h"

namespace megatron_opt {
namespace {

using at::Tensor;
using Tensors = at::TensorList;

// Equal blocks, (rows, cols) or (count, rows, cols).
struct Stack {
  float* data;
  int64_t count, rows, cols, step, ld;

  float* block(int64_t i) const { return data + i * step; }
};

Stack stack_of(const Tensor& t, const char* name) {
  TORCH_CHECK((t.dim() == 2 || t.dim() == 3) && t.scalar_type() == at::kFloat && t.device().is_cpu(), name,
              " must be float32, on CPU and of two or three dimensions.");
  const int64_t count = t.dim() == 3 ? t.size(0) : 1, rows = t.size(-2), cols = t.size(-1);
  TORCH_CHECK((cols <= 1 || t.stride(-1) == 1) && (rows <= 1 || t.stride(-2) >= cols) && (count <= 1 || t.stride(0) >= cols),
              name, " has overlapping or scattered rows.");
  return {const_cast<float*>(t.const_data_ptr<float>()), count, rows, cols, t.dim() == 3 ? t.stride(0) : 0,
          rows > 1 ? t.stride(-2) : cols};
}

// One of a list's stacks beside those of another list, all of its kind of one shape.
Stack beside(Tensors list, size_t i, const Stack& like, const char* name) {
  const Stack stack = stack_of(list[i], name);
  TORCH_CHECK(stack.count == like.count && stack.rows == like.rows && stack.cols == like.cols, name, " must have the shapes of ",
              "the others.");
  return stack;
}

// Square matrices (count, size, size) of one side; without blocks where the list is empty: the side has none.
Stack square(Tensors list, size_t i, int64_t count, int64_t size, const char* name) {
  if (list.empty()) return {nullptr, 0, 0, 0, 0, 0};
  const Tensor& t = list[i];
  const bool fits = t.dim() >= 2 && t.size(-1) == size && t.size(-2) == size && t.numel() == count * size * size;
  TORCH_CHECK(fits && t.is_contiguous() && t.scalar_type() == at::kFloat && t.device().is_cpu(), name,
              " must be contiguous, float32, on CPU and of shape (", count, ", ", size, ", ", size, ").");
  return {const_cast<float*>(t.const_data_ptr<float>()), count, size, size, size * size, size};
}

void check_lengths(size_t count, std::initializer_list<Tensors> all, std::initializer_list<Tensors> optional) {
  TORCH_CHECK(has_products(), "this processor has no AVX-512.");
  for (const Tensors& list : all) TORCH_CHECK(list.size() == count, "lists must be equally long.");
  for (const Tensors& list : optional) TORCH_CHECK(list.empty() || list.size() == count, "lists must be equally long.");
}

// Factors, then Adam in the basis; moments and factors advance in place, directions replace gradients.
void project_adam(Tensors grads, Tensors moments, Tensors seconds, Tensors lefts, Tensors rights, Tensors left_factors,
                  Tensors right_factors, double beta1, double beta2, double eps, double scale, double gain, double decay,
                  double floor) {
  check_lengths(grads.size(), {moments, seconds}, {lefts, rights, left_factors, right_factors});
  std::vector<Projection> blocks;
  for (size_t i = 0; i < grads.size(); ++i) {
    const Stack g = stack_of(grads[i], "grad"), m = beside(moments, i, g, "moment"), v = beside(seconds, i, g, "second");
    if (g.rows == 0 || g.cols == 0) continue;
    const Stack left = square(lefts, i, g.count, g.rows, "left"), right = square(rights, i, g.count, g.cols, "right");
    const Stack gg = square(left_factors, i, g.count, g.rows, "left factor");
    const Stack hh = square(right_factors, i, g.count, g.cols, "right factor");
    for (int64_t b = 0; b < g.count; ++b) {
      blocks.push_back({g.block(b), m.block(b), v.block(b), left.block(b), right.block(b), {gg.block(b), hh.block(b)}, g.ld, m.ld,
                        v.ld, g.rows, g.cols});
    }
  }
  const RotatedAdam settings{static_cast<float>(1.0 - beta1), static_cast<float>(beta2), static_cast<float>(1.0 - beta2),
                             static_cast<float>(eps), static_cast<float>(scale), static_cast<float>(floor)};
  project_adam_cpu(settings, {static_cast<float>(gain), static_cast<float>(decay)}, blocks, at::get_num_threads());
}

// factor ← decay·factor + gain·g·gᵀ (lefts), gain·gᵀ·g (rights).
void advance_factors(Tensors lefts, Tensors rights, Tensors grads, double gain, double decay) {
  check_lengths(grads.size(), {}, {lefts, rights});
  std::vector<Product<float>> products[2];
  for (size_t i = 0; i < grads.size(); ++i) {
    const Stack g = stack_of(grads[i], "grad");
    const Stack left = square(lefts, i, g.count, g.rows, "left"), right = square(rights, i, g.count, g.cols, "right");
    for (int64_t b = 0; b < g.count; ++b) {
      const auto add = [&](int side, float* factor, int64_t n, int64_t k) {
        if (factor == nullptr || n == 0) return;
        products[side].push_back({g.block(b), g.block(b), factor, factor, g.ld, g.ld, n, n, n, n, k, static_cast<float>(gain),
                                  static_cast<float>(decay), side == 0, true});
      };
      add(0, left.block(b), g.rows, g.cols);
      add(1, right.block(b), g.cols, g.rows);
    }
  }
  for (int side = 0; side < 2; ++side) {
    std::vector<Product<float>>& list = products[side];
    for (size_t i = 0; i + 1 < list.size(); ++i) {
      if (list[i].n == list[i + 1].n && list[i].n * list[i].n <= kPrefetched) {
        list[i] = ahead(list[i], list[i + 1].c, list[i + 1].n * list[i + 1].n);
      }
    }
    run_products(list, side == 1, at::get_num_threads());
  }
}

// Whether the bases of each block were found, by blocks in their order.
Tensor refresh_bases(Tensors moments, Tensors seconds, Tensors lefts, Tensors rights, Tensors left_factors, Tensors right_factors,
                     double shift, double floor, double left_noise, double right_noise) {
  check_lengths(moments.size(), {seconds}, {lefts, rights});
  TORCH_CHECK(left_factors.size() == lefts.size() && right_factors.size() == rights.size(), "lists must be equally long.");
  std::vector<Refresh> blocks;
  for (size_t i = 0; i < moments.size(); ++i) {
    const Stack m = stack_of(moments[i], "moment"), v = beside(seconds, i, m, "second");
    const Stack left = square(lefts, i, m.count, m.rows, "left"), right = square(rights, i, m.count, m.cols, "right");
    const Stack gg = square(left_factors, i, m.count, m.rows, "left factor");
    const Stack hh = square(right_factors, i, m.count, m.cols, "right factor");
    for (int64_t b = 0; b < m.count; ++b) {
      blocks.push_back({m.block(b), v.block(b), m.ld, v.ld, m.rows, m.cols, {left.block(b), right.block(b)},
                        {gg.block(b), hh.block(b)}});
    }
  }
  const PowerStep settings{static_cast<float>(shift), static_cast<float>(floor), {left_noise, right_noise}};
  const std::vector<char> success = refresh_cpu(settings, blocks, at::get_num_threads());
  Tensor all = at::empty({static_cast<int64_t>(success.size())}, at::TensorOptions().dtype(at::kBool));
  std::copy(success.begin(), success.end(), all.mutable_data_ptr<bool>());
  return all;
}

// Where there is noise, factors learn in place; preconditioned moments replace moments.
void kron_step(Tensors lefts, Tensors rights, Tensors moments, Tensors noises, at::ArrayRef<double> dampings, double lr) {
  check_lengths(moments.size(), {lefts, rights}, {noises});
  TORCH_CHECK(dampings.size() == noises.size(), "lists must be equally long.");
  std::vector<KronBlock> blocks;
  for (size_t i = 0; i < moments.size(); ++i) {
    const Stack m = stack_of(moments[i], "moment");
    if (m.rows == 0 || m.cols == 0) continue;
    const Stack left = square(lefts, i, m.count, m.rows, "left"), right = square(rights, i, m.count, m.cols, "right");
    const Stack v = noises.empty() ? Stack{nullptr, 0, 0, 0, 0, 0} : beside(noises, i, m, "noise");
    const float damping = noises.empty() ? 0.0f : static_cast<float>(dampings[i]);
    for (int64_t b = 0; b < m.count; ++b) {
      blocks.push_back({left.block(b), right.block(b), m.block(b), v.block(b), m.ld, v.ld, m.rows, m.cols, damping});
    }
  }
  kron_cpu(static_cast<float>(lr), blocks, at::get_num_threads());
}

// (bases, whether each was found) of contiguous columns (B, n, n).
std::tuple<Tensor, Tensor> cholesky_qr(const Tensor& columns, double noise) {
  TORCH_CHECK(has_products(), "this processor has no AVX-512.");
  TORCH_CHECK(columns.dim() == 3 && columns.size(1) == columns.size(2) && columns.is_contiguous() &&
                  columns.scalar_type() == at::kFloat && columns.device().is_cpu(),
              "columns must be contiguous, float32, on CPU and of shape (B, n, n).");
  const int64_t batch = columns.size(0), n = columns.size(1);
  Tensor basis = at::empty(columns.sizes(), columns.options());
  Tensor success = at::zeros({batch}, columns.options().dtype(at::kBool));
  std::vector<Basis> bases(static_cast<size_t>(batch));
  for (int64_t i = 0; i < batch; ++i) {
    bases[i] = {columns.const_data_ptr<float>() + i * n * n, basis.mutable_data_ptr<float>() + i * n * n, n};
  }
  const std::vector<char> taken = cholesky_qr_cpu(bases, noise, at::get_num_threads());
  for (int64_t i = 0; i < batch; ++i) success.mutable_data_ptr<bool>()[i] = taken[i] != 0;
  return {basis, success};
}

}  // namespace

void register_preconditioner_operators() {
  static torch::Library cpu(torch::Library::IMPL, "megatron_opt", c10::DispatchKey::CPU, __FILE__, __LINE__);
  cpu.impl("project_adam", project_adam);
  cpu.impl("advance_factors", advance_factors);
  cpu.impl("refresh_bases", refresh_bases);
  cpu.impl("cholesky_qr", cholesky_qr);
  cpu.impl("kron_step", kron_step);
}

}  // namespace megatron_opt
