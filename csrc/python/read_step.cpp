#include "python/read_step.h"

namespace prodigy {

Hyper read_hyper(const pybind11::handle& h) {
  return {h.attr("lr").cast<double>(),
          h.attr("beta1").cast<double>(),
          h.attr("beta2").cast<double>(),
          h.attr("eps").cast<double>(),
          h.attr("weight_decay").cast<double>(),
          h.attr("decouple").cast<bool>(),
          h.attr("use_bias_correction").cast<bool>(),
          h.attr("safeguard_warmup").cast<bool>(),
          h.attr("maximize").cast<bool>()};
}

Shared read_shared(const pybind11::handle& shared) {
  return {shared.attr("d0").cast<double>(), shared.attr("d_coef").cast<double>(),
          shared.attr("growth_rate").cast<double>(), shared.attr("beta3").cast<double>()};
}

}  // namespace prodigy
