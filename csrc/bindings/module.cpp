// sae_kernels._C: pointers, sizes and a thread count in, no tensor allocated, no torch header.
// Arguments are checked in Python (sae_kernels/primitives); an address here is taken as given.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/isa.h"
#if defined(SAE_CUDA_ARCHS)
#include "cuda.h"
#endif

namespace py = pybind11;
using namespace sae;

namespace {

using Address = uintptr_t;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}
DType dtype_of(int code) { return static_cast<DType>(code); }

SelectTopkArgs select_args(int dtype, Address x, Address W, Address b, Address rank_scale,
                           Address values, Address indices, int64_t B, int64_t D, int64_t F,
                           int64_t k, const Routes& routes, Address workspace, int threads) {
  return {dtype_of(dtype),
          at(x),
          at(W),
          at(b),
          at(rank_scale),
          at(values),
          at<int32_t>(indices),
          B,
          D,
          F,
          k,
          routes,
          at(workspace),
          threads};
}

Routes routes_of(Address tokens, Address starts, int64_t experts) {
  return {at<int32_t>(tokens), at<int32_t>(starts), experts};
}

// offsets, entries, rows, coef, source (0: ones), dtype of source
using TermTuple = std::tuple<Address, Address, Address, Address, Address, int>;

std::vector<Term> terms_of(const std::vector<TermTuple>& tuples) {
  std::vector<Term> terms;
  for (const auto& [offsets, entries, rows, coef, source, dtype] : tuples) {
    terms.push_back({at<int32_t>(offsets), at<int32_t>(entries), at<int32_t>(rows), at(coef),
                     at(source), dtype_of(dtype)});
  }
  return terms;
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
#if defined(_OPENMP)
  info["threads"] = "OpenMP";
#else
  info["threads"] = "std::thread";
#endif
#if defined(SAE_CUDA_ARCHS)
  info["cuda_archs"] = SAE_CUDA_ARCHS;
#else
  info["cuda_archs"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Kernels of sae_kernels over raw pointers; use sae_kernels.functional instead.";

  module.def("build_info", &build_info);

  module.def("isas", [] {
    std::vector<std::pair<std::string, bool>> names;
    for (const Isa& isa : isas()) names.emplace_back(isa.name, isa.supported);
    return names;
  });

  module.def("select_topk_workspace",
             [](const std::string& isa, int dtype, bool scaled, int64_t B, int64_t D, int64_t F,
                int64_t k, int64_t experts, int threads) {
               const Routes routes = routes_of(0, 0, experts);
               return kernels(isa).select_topk_workspace(
                   select_args(dtype, 0, 0, 0, scaled, 0, 0, B, D, F, k, routes, 0, threads));
             });

  // tokens and starts: null where every row meets all of W, as one expert's.
  module.def("select_topk", [](const std::string& isa, int dtype, Address x, Address W, Address b,
                               Address rank_scale, Address values, Address indices, int64_t B,
                               int64_t D, int64_t F, int64_t k, Address tokens, Address starts,
                               int64_t experts, Address workspace, int threads) {
    const KernelTable& table = kernels(isa);
    py::gil_scoped_release release;
    return table.select_topk(select_args(dtype, x, W, b, rank_scale, values, indices, B, D, F, k,
                                         routes_of(tokens, starts, experts), workspace, threads));
  });

  module.def("route_top1_workspace", [](const std::string& isa, int dtype, int64_t B, int64_t D,
                                        int64_t E, int threads) {
    return kernels(isa).route_top1_workspace(
        {dtype_of(dtype), nullptr, nullptr, nullptr, nullptr, nullptr, B, D, E, nullptr, threads});
  });

  module.def("route_top1", [](const std::string& isa, int dtype, Address x, Address W, Address b,
                              Address experts, Address probabilities, int64_t B, int64_t D,
                              int64_t E, Address workspace, int threads) {
    const KernelTable& table = kernels(isa);
    py::gil_scoped_release release;
    table.route_top1({dtype_of(dtype), at(x), at(W), at(b), at<int32_t>(experts), at(probabilities),
                      B, D, E, at(workspace), threads});
  });

  py::class_<Selection>(module, "Selection")
      .def("count", &Selection::count)
      .def("write", [](const Selection& found, Address values, Address indices, Address offsets) {
        py::gil_scoped_release release;
        found.write(at(values), at<int32_t>(indices), at<int32_t>(offsets));
      });

  module.def("select_threshold_workspace", [](const std::string& isa, int dtype, int64_t B,
                                              int64_t D, int64_t F, int threads) {
    return kernels(isa).select_threshold_workspace(
        {dtype_of(dtype), nullptr, nullptr, nullptr, nullptr, B, D, F, nullptr, threads});
  });

  module.def("select_threshold",
             [](const std::string& isa, int dtype, Address x, Address W, Address b, Address bounds,
                int64_t B, int64_t D, int64_t F, Address workspace, int threads) {
               const KernelTable& table = kernels(isa);
               py::gil_scoped_release release;
               return table.select_threshold({dtype_of(dtype), at(x), at(W), at(b), at(bounds), B,
                                              D, F, at(workspace), threads});
             });

  module.def("decode", [](const std::string& isa, int dtype, Address values, Address indices,
                          Address offsets, Address W, Address b_dec, Address group_ends,
                          Address group_weights, Address target, Address out, Address sse,
                          Address code_grad, int64_t B, int64_t K, int64_t D, int64_t F, int64_t G,
                          bool drop_zeros, int threads) {
    const KernelTable& table = kernels(isa);
    py::gil_scoped_release release;
    return table.decode({dtype_of(dtype), at(values), at<int32_t>(indices), at<int32_t>(offsets),
                         at(W), at(b_dec), at<int32_t>(group_ends), at(group_weights), at(target),
                         at(out), at(sse), at(code_grad), B, K, D, F, G, drop_zeros, threads});
  });

  module.def("code_grad", [](const std::string& isa, int dtype, Address grad, Address indices,
                             Address offsets, Address W, Address group_ends, Address out, int64_t B,
                             int64_t K, int64_t D, int64_t F, int64_t G, int threads) {
    const KernelTable& table = kernels(isa);
    py::gil_scoped_release release;
    return table.code_grad({dtype_of(dtype), at(grad), at<int32_t>(indices), at<int32_t>(offsets),
                            at(W), at<int32_t>(group_ends), at(out), B, K, D, F, G, threads});
  });

  module.def("transpose_codes",
             [](const std::string& isa, int dtype, Address indices, Address values, Address row_ids,
                Address offsets, Address entries, Address rows, Address workspace, int64_t N,
                int64_t F, int64_t entries_per_row, bool drop_zeros, int threads) {
               const KernelTable& table = kernels(isa);
               py::gil_scoped_release release;
               return table.transpose_codes(
                   {dtype_of(dtype), at<int32_t>(indices), at(values), at<int32_t>(row_ids),
                    at<int32_t>(offsets), at<int32_t>(entries), at<int32_t>(rows),
                    at<int32_t>(workspace), N, F, entries_per_row, drop_zeros, threads});
             });

  module.def("row_grad", [](const std::string& isa, int dtype, const std::vector<TermTuple>& tuples,
                            Address out, int64_t F, int64_t width, int threads) {
    const KernelTable& table = kernels(isa);
    const std::vector<Term> terms = terms_of(tuples);
    py::gil_scoped_release release;
    table.row_grad({dtype_of(dtype), terms.data(), static_cast<int64_t>(terms.size()), F, width,
                    at(out), threads});
  });

  module.def("row_update",
             [](const std::string& isa, int dtype, int copy_dtype, Address param, Address m,
                Address v, Address copy, const std::vector<TermTuple>& tuples, int64_t F,
                int64_t width, Address row_coef, Address dense_grad, Address dense_slot,
                int64_t row_parts, Address hyper, double beta1, double beta2, double eps, int norm,
                int64_t slices, bool lazy, Address sqnorm, Address workspace, int threads) {
               const KernelTable& table = kernels(isa);
               const std::vector<Term> terms = terms_of(tuples);
               py::gil_scoped_release release;
               table.row_update({dtype_of(dtype),
                                 dtype_of(copy_dtype),
                                 at(param),
                                 at(m),
                                 at(v),
                                 at(copy),
                                 terms.data(),
                                 static_cast<int64_t>(terms.size()),
                                 F,
                                 width,
                                 at(row_coef),
                                 at(dense_grad),
                                 at<int32_t>(dense_slot),
                                 row_parts,
                                 at<double>(hyper),
                                 beta1,
                                 beta2,
                                 eps,
                                 static_cast<Norm>(norm),
                                 slices,
                                 lazy,
                                 at(sqnorm),
                                 at(workspace),
                                 threads});
             });

#if defined(SAE_CUDA_ARCHS)
  module.def("cuda_launch", &cuda_launch);
  module.def("cuda_reason", [](int device) -> std::optional<std::string> {
    const std::string reason = cuda_reason(device);
    return reason.empty() ? std::nullopt : std::make_optional(reason);
  });
#endif
}
