// Native kernels of the matrix operators on CPU: products, triangular solves, Newton–Schulz, steps in an eigenbasis.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cpu/eigenbasis.h"
#include "cpu/orthogonalize.h"
#include "cpu/teams.h"
#include "operators.h"

namespace megatron_opt {
namespace {

using at::Tensor;

struct Operand {
  const float* data;
  int64_t ld, batch_stride;
  bool transposed;
};

Operand operand(const Tensor& t, const char* name) {
  TORCH_CHECK(t.scalar_type() == at::kFloat && t.device().is_cpu(), name, " is not float32 on CPU.");
  const int64_t rows = t.size(-2), cols = t.size(-1), down = t.stride(-2), across = t.stride(-1);
  const int64_t batch = t.dim() == 3 ? t.stride(0) : 0;
  if (across == 1 || cols == 1) {
    TORCH_CHECK(down >= cols || rows == 1, name, " has overlapping rows.");
    if (across == 1) return {t.const_data_ptr<float>(), std::max(down, cols), batch, false};
  }
  TORCH_CHECK(down == 1 || rows == 1, name, " is neither row-major nor transposed.");
  return {t.const_data_ptr<float>(), std::max(across, rows), batch, true};
}

// out = alpha·a·b + beta·out, (m, n) or batches (B, m, n); `symmetric` promises a symmetric result, a_shape and b_shape (Triangle)
// triangular operands.
void product(const Tensor& out, const Tensor& a, const Tensor& b, double alpha, double beta, bool symmetric, int64_t a_shape,
             int64_t b_shape) {
  TORCH_CHECK(has_products(), "this processor has no AVX-512.");
  const int64_t dim = out.dim();
  TORCH_CHECK((dim == 2 || dim == 3) && a.dim() == dim && b.dim() == dim, "operands must all have 2 or 3 dimensions.");
  const int64_t batch = dim == 3 ? out.size(0) : 1, m = out.size(-2), n = out.size(-1), k = a.size(-1);
  TORCH_CHECK(a.size(-2) == m && b.size(-2) == k && b.size(-1) == n && (dim == 2 || (a.size(0) == batch && b.size(0) == batch)),
              "shapes ", a.sizes(), " and ", b.sizes(), " do not give ", out.sizes(), ".");
  TORCH_CHECK(!symmetric || m == n, "a symmetric result must be square.");
  TORCH_CHECK((a_shape == 0 || m == k) && (b_shape == 0 || k == n) && std::max(a_shape, b_shape) <= 2 &&
                  std::min(a_shape, b_shape) >= 0,
              "a triangular operand must be square.");
  TORCH_CHECK(out.is_contiguous() && !out.is_alias_of(a) && !out.is_alias_of(b),
              "the result must be contiguous, and no operand.");
  if (out.numel() == 0) return;
  const Operand left = operand(a, "a"), right = operand(b, "b");
  TORCH_CHECK(out.scalar_type() == at::kFloat, "the result must be float32.");
  float* to = out.mutable_data_ptr<float>();
  std::vector<Product<float>> products(static_cast<size_t>(batch));
  for (int64_t i = 0; i < batch; ++i) {
    float* c = to + i * m * n;
    products[i] = Product<float>{left.data + i * left.batch_stride,
                                 right.data + i * right.batch_stride,
                                 beta == 0.0 ? nullptr : c,
                                 c,
                                 left.ld,
                                 right.ld,
                                 n,
                                 n,
                                 m,
                                 n,
                                 k,
                                 static_cast<float>(alpha),
                                 static_cast<float>(beta),
                                 right.transposed,
                                 symmetric,
                                 static_cast<Triangle>(a_shape),
                                 static_cast<Triangle>(b_shape)};
  }
  run_products(products, left.transposed, at::get_num_threads());
}

std::vector<Tensor> orthogonalize(at::TensorList matrices, at::ArrayRef<double> steps, double eps, bool add_eps, bool bf16,
                                  int64_t gram) {
  TORCH_CHECK(bf16 ? has_bf16_products() : has_products(), "this processor has no AVX-512", bf16 ? "_BF16." : ".");
  TORCH_CHECK(!steps.empty() && steps.size() % 3 == 0 && gram >= 1, "steps come in threes (a, b, c), gram from 1.");
  NewtonSchulz settings{{}, eps, add_eps, bf16, static_cast<int>(gram)};
  for (size_t i = 0; i < steps.size(); i += 3) {
    settings.steps.push_back(
        {static_cast<float>(steps[i]), static_cast<float>(steps[i + 1]), static_cast<float>(steps[i + 2])});
  }
  std::vector<Tensor> results;
  std::vector<Orthogonalization> list;
  for (const Tensor& m : matrices) {
    TORCH_CHECK(m.dim() == 2 && m.is_contiguous() && m.scalar_type() == at::kFloat && m.device().is_cpu(),
                "matrices must be contiguous, two-dimensional, float32 and on CPU.");
    results.push_back(at::empty(m.sizes(), m.options()));
    list.push_back({m.const_data_ptr<float>(), results.back().mutable_data_ptr<float>(), m.size(0), m.size(1)});
  }
  orthogonalize_cpu(settings, list, at::get_num_threads());
  return results;
}

// l⁻¹·x for lower triangular l (B, k, k), x (B, k, n), either of them row-major or transposed.
Tensor solve_lower(const Tensor& l, const Tensor& x) {
  TORCH_CHECK(has_products(), "this processor has no AVX-512.");
  TORCH_CHECK(l.dim() == 3 && x.dim() == 3 && l.size(0) == x.size(0) && l.size(1) == l.size(2) && l.size(2) == x.size(1),
              "shapes ", l.sizes(), " and ", x.sizes(), " are no triangular systems.");
  Tensor out = at::empty(x.sizes(), x.options());
  if (out.numel() == 0) return out;
  const Operand left = operand(l, "l"), right = operand(x, "x");
  const int64_t k = x.size(1), n = x.size(2);
  std::vector<Solve> solves(static_cast<size_t>(x.size(0)));
  for (size_t i = 0; i < solves.size(); ++i) {
    solves[i] = {left.data + i * left.batch_stride, right.data + i * right.batch_stride,
                 out.mutable_data_ptr<float>() + i * k * n, left.ld, right.ld, n, k, n, right.transposed};
  }
  run_solves(solves, left.transposed, at::get_num_threads());
  return out;
}

void check_basis(const std::optional<Tensor>& basis, int64_t batch, int64_t size, const char* name) {
  if (!basis.has_value()) return;
  TORCH_CHECK(basis->sizes() == at::IntArrayRef({batch, size, size}) && basis->is_contiguous() &&
                  basis->scalar_type() == at::kFloat && basis->device().is_cpu(),
              name, " must be contiguous, float32, on CPU and of shape (", batch, ", ", size, ", ", size, ").");
}

void check_rows(const Tensor& t, const Tensor& like, const char* name) {
  TORCH_CHECK(t.sizes() == like.sizes() && t.scalar_type() == at::kFloat && t.device().is_cpu(), name,
              " must be float32, on CPU and of shape ", like.sizes(), ".");
  TORCH_CHECK((t.size(2) <= 1 || t.stride(2) == 1) && (t.size(1) <= 1 || t.stride(1) >= t.size(2)) &&
                  (t.size(0) <= 1 || t.stride(0) >= t.size(2)),
              name, " has overlapping or scattered rows.");
}

// Adam in the basis, (B, rows, cols); both moments advance in place.
Tensor project_adam(const Tensor& grad, const Tensor& moment, const Tensor& second, const std::optional<Tensor>& left,
                    const std::optional<Tensor>& right, double beta1, double beta2, double eps, double scale) {
  TORCH_CHECK(has_products(), "this processor has no AVX-512.");
  TORCH_CHECK(grad.dim() == 3, "grad must have three dimensions.");
  check_rows(grad, grad, "grad");
  check_rows(moment, grad, "moment");
  check_rows(second, grad, "second");
  const int64_t batch = grad.size(0), rows = grad.size(1), cols = grad.size(2);
  check_basis(left, batch, rows, "left");
  check_basis(right, batch, cols, "right");
  Tensor out = at::empty(grad.sizes(), grad.options());
  if (out.numel() == 0) return out;
  std::vector<Projection> blocks(static_cast<size_t>(batch));
  for (int64_t i = 0; i < batch; ++i) {
    blocks[i] = {grad.const_data_ptr<float>() + i * grad.stride(0),
                 moment.mutable_data_ptr<float>() + i * moment.stride(0),
                 second.mutable_data_ptr<float>() + i * second.stride(0),
                 out.mutable_data_ptr<float>() + i * rows * cols,
                 left ? left->const_data_ptr<float>() + i * rows * rows : nullptr,
                 right ? right->const_data_ptr<float>() + i * cols * cols : nullptr,
                 grad.stride(1),
                 moment.stride(1),
                 second.stride(1),
                 rows,
                 cols};
  }
  const RotatedAdam settings{static_cast<float>(1.0 - beta1), static_cast<float>(beta2), static_cast<float>(1.0 - beta2),
                             static_cast<float>(eps), static_cast<float>(scale)};
  project_adam_cpu(settings, blocks, at::get_num_threads());
  return out;
}

// (bases, whether each was found) of contiguous columns (B, n, n).
std::tuple<Tensor, Tensor> cholesky_qr(const Tensor& columns, double noise) {
  TORCH_CHECK(has_products(), "this processor has no AVX-512.");
  TORCH_CHECK(columns.dim() == 3 && columns.size(1) == columns.size(2) && columns.is_contiguous() &&
                  columns.scalar_type() == at::kFloat && columns.device().is_cpu(),
              "columns must be contiguous, float32, on CPU and of shape (B, n, n).");
  const int64_t batch = columns.size(0), n = columns.size(1);
  Tensor basis = at::empty(columns.sizes(), columns.options());
  Tensor found = at::zeros({batch}, columns.options().dtype(at::kBool));
  std::vector<Basis> bases(static_cast<size_t>(batch));
  for (int64_t i = 0; i < batch; ++i) {
    bases[i] = {columns.const_data_ptr<float>() + i * n * n, basis.mutable_data_ptr<float>() + i * n * n, n};
  }
  const std::vector<char> taken = cholesky_qr_cpu(bases, noise, at::get_num_threads());
  for (int64_t i = 0; i < batch; ++i) found.mutable_data_ptr<bool>()[i] = taken[i] != 0;
  return {basis, found};
}

}  // namespace

void register_matrix_operators() {
  static torch::Library cpu(torch::Library::IMPL, "megatron_opt", c10::DispatchKey::CPU, __FILE__, __LINE__);
  cpu.impl("product", product);
  cpu.impl("orthogonalize", orthogonalize);
  cpu.impl("solve_lower", solve_lower);
  cpu.impl("project_adam", project_adam);
  cpu.impl("cholesky_qr", cholesky_qr);
}

}  // namespace megatron_opt
