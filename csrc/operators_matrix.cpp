// Native kernels of the matrix operators on CPU: products, triangular solves, Newton–Schulz.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

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

}  // namespace

void register_matrix_operators() {
  static torch::Library cpu(torch::Library::IMPL, "megatron_opt", c10::DispatchKey::CPU, __FILE__, __LINE__);
  cpu.impl("product", product);
  cpu.impl("orthogonalize", orthogonalize);
  cpu.impl("solve_lower", solve_lower);
}

}  // namespace megatron_opt
