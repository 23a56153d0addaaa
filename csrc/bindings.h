// What both binding files need.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/numbers.h"

inline ktx::Number ktx_number(const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, "activations must be float32, float16 or bfloat16");
  return type == ScalarType::Float ? ktx::Number::F32 : type == ScalarType::Half ? ktx::Number::F16 : ktx::Number::BF16;
}
