// sae_kernels._C: tensors by their data_ptr(), sizes and a thread count in, no tensor allocated, no
// torch header. Arguments are checked in Python (sae_kernels/primitives) and taken as given here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../cpu/isa.h"
#if defined(SAE_CUDA_ARCHS)
#include "cuda.h"
#endif

namespace py = pybind11;
using namespace sae;

namespace {

template <class Struct>
Struct filled(const py::tuple& given, std::vector<Term>* terms);

// Where a tensor's data starts; null for None.
void* address_of(py::handle tensor) {
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  if (tensor.is_none()) return nullptr;
  PyObject* const address = PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr);
  if (address == nullptr) throw py::error_already_set();
  return reinterpret_cast<void*>(py::reinterpret_steal<py::int_>(address).cast<uintptr_t>());
}

// An argument of a kernel as Python gives it. It converts to what the field of the Args struct is
// that it initialises: a tensor to a pointer, a number to a size, a flag or an enum, a tuple to a
// struct, and a list of tuples to an array of terms, which lives as long as `terms`.
struct Argument {
  py::handle given;
  std::vector<Term>* terms;

  template <class Field>
  operator Field() const {
    if constexpr (std::is_same_v<Field, const Term*>) {
      for (const py::handle term : given) terms->push_back(Argument{term, nullptr});
      return terms->data();
    } else if constexpr (std::is_pointer_v<Field>) {
      return static_cast<Field>(address_of(given));
    } else if constexpr (std::is_enum_v<Field>) {
      return static_cast<Field>(given.cast<int>());
    } else if constexpr (std::is_class_v<Field>) {
      return filled<Field>(given.cast<py::tuple>(), terms);
    } else {
      return given.cast<Field>();
    }
  }
};

// How many fields a struct has: as many arguments as its braces take.
template <class Struct, class... Arguments>
constexpr auto takes(int) -> decltype(Struct{std::declval<Arguments>()...}, true) {
  return true;
}
template <class Struct, class... Arguments>
constexpr bool takes(long) {
  return false;
}
template <class Struct, class... Arguments>
constexpr size_t count_fields() {
  if constexpr (takes<Struct, Arguments..., Argument>(0)) {
    return count_fields<Struct, Arguments..., Argument>();
  } else {
    return sizeof...(Arguments);
  }
}

template <class Struct, size_t... I>
Struct filled(const py::tuple& given, std::vector<Term>* terms, std::index_sequence<I...>) {
  return {Argument{given[I], terms}...};
}

// A struct whose fields are `given`.
template <class Struct>
Struct filled(const py::tuple& given, std::vector<Term>* terms) {
  constexpr size_t n = count_fields<Struct>();
  if (given.size() != n) {
    throw py::type_error("expected " + std::to_string(n) + " arguments after the ISA, got " +
                         std::to_string(given.size()));
  }
  return filled<Struct>(given, terms, std::make_index_sequence<n>());
}

// A kernel as a function of the ISA's name and of the fields of its Args struct, in their order.
template <class Result, class Args>
void define(py::module_& module, const char* name, Result (*KernelTable::*kernel)(const Args&)) {
  module.def(name, [kernel](const std::string& isa, const py::args& given) {
    const auto run = kernels(isa).*kernel;
    std::vector<Term> terms;
    const Args args = filled<Args>(given, &terms);
    py::gil_scoped_release release;
    return run(args);
  });
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

// Every call works on its own arguments, and what is static here and in the kernels never changes
// once it is made; so a free-threaded interpreter may run calls at the same time.
PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  module.doc() = "Kernels of sae_kernels over raw pointers; use sae_kernels.functional instead.";

  module.def("build_info", &build_info);

  module.def("isas", [] {
    std::vector<std::pair<std::string, bool>> names;
    for (const Isa& isa : isas()) names.emplace_back(isa.name, isa.supported);
    return names;
  });

  py::class_<Selection>(module, "Selection")
      .def("count", &Selection::count)
      .def("write",
           [](const Selection& found, py::handle values, py::handle indices, py::handle offsets) {
             void* const to = address_of(values);
             auto* const latents = static_cast<int32_t*>(address_of(indices));
             auto* const starts = static_cast<int32_t*>(address_of(offsets));
             py::gil_scoped_release release;
             found.write(to, latents, starts);
           });

#define SAE_KERNEL(result, name, arguments) define(module, #name, &KernelTable::name);
#include "sae_kernels/kernels.h"

#if defined(SAE_CUDA_ARCHS)
  module.def("cuda_launch", &cuda_launch);
  module.def("cuda_reason", [](int device) -> std::optional<std::string> {
    const std::string reason = cuda_reason(device);
    return reason.empty() ? std::nullopt : std::make_optional(reason);
  });
#endif
}
