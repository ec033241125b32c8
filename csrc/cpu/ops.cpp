#include "ops.h"

#include <torch/csrc/stable/library.h>

namespace saemnesia_fast {

STABLE_TORCH_LIBRARY(saemnesia_fast_cpu, m) {
  m.def("encode_topk(Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_dec, int k) -> (Tensor, Tensor)");
  m.def("select_topk(Tensor pre, int k) -> (Tensor, Tensor)");
  m.def("decode(Tensor values, Tensor indices, Tensor W_dec, Tensor b_dec) -> Tensor");
  m.def(
      "decode_error(Tensor values, Tensor indices, Tensor W_dec, Tensor b_dec, Tensor x, Tensor scale) "
      "-> (Tensor, Tensor)");
  m.def(
      "erase(Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_dec, Tensor W_dec, int k, Tensor latents, "
      "Tensor thresholds, Tensor factors, Tensor(a!) out) -> ()");
  m.def(
      "probe(Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_dec, int k, Tensor latents, Tensor thresholds) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(saemnesia_fast_cpu, CPU, m) {
  m.impl("encode_topk", TORCH_BOX(&encode_topk));
  m.impl("select_topk", TORCH_BOX(&select_topk));
  m.impl("decode", TORCH_BOX(&decode));
  m.impl("decode_error", TORCH_BOX(&decode_error));
  m.impl("erase", TORCH_BOX(&erase));
  m.impl("probe", TORCH_BOX(&probe));
}

}  // namespace saemnesia_fast
