// Every kernel of one ISA variant over odd shapes, against plain loops over integers.
//
// Usage: kernels_test <isa>; exit code 77 where this machine cannot run the variant.
#include <cstdio>
#include <cstring>
#include <vector>

#include "decoder_and_rows.h"
#include "encoders.h"

namespace sae::test {
namespace {

template <class E>
void all(const KernelTable& kernels, const char* name) {
  uint64_t seed = 0;
  std::vector<RuledOut> ways{{Screening::none, false}, {Screening::none, true}};
  for (const Screening how :
       {Screening::plain, Screening::pairs, Screening::fours, Screening::tiles}) {
    if (kernels.can_screen({how, 1})) ways.push_back({how, false});
  }
  for (const Shape& shape : kShapes) {
    for (const int threads : {1, 3}) {
      char text[96];
      std::snprintf(text, sizeof(text), "%s B=%d D=%d F=%d k=%d threads=%d", name,
                    static_cast<int>(shape.B), static_cast<int>(shape.D), static_cast<int>(shape.F),
                    static_cast<int>(shape.k), threads);
      where = text;
      Random random(++seed);
      for (const bool scaled : {false, true}) {
        for (const bool by_magnitude : {false, true}) {
          for (const RuledOut how : ways) {
            select<E>(kernels, shape, scaled, by_magnitude, how, threads, random);
          }
        }
      }
      for (const int experts : {1, 2, 5}) {
        for (const RuledOut how : ways) {
          select_routed<E>(kernels, shape, experts, how, threads, random);
        }
      }
      route<E>(kernels, shape, threads, random);
      for (const int level : {-100000, 0, 20, 100000}) {
        for (const RuledOut how : ways) {
          threshold<E>(kernels, shape, level, how, threads, random);
        }
      }
      for (const Form& form : kForms) decode<E>(kernels, shape, form, threads, random);
      rows<Acc<E>, E>(kernels, shape, threads, random);
    }
  }
  where = "";
}

}  // namespace
}  // namespace sae::test

int main(int argc, char** argv) {
  using namespace sae;
  if (argc != 2) {
    std::fprintf(stderr, "usage: kernels_test <isa>\n");
    return 2;
  }
  for (const Isa& isa : isas()) {
    if (std::strcmp(isa.name, argv[1]) != 0) continue;
    if (!isa.supported) {
      std::printf("%s: not on this machine\n", isa.name);
      return 77;
    }
    test::all<float>(*isa.kernels, "f32");
    test::all<double>(*isa.kernels, "f64");
    test::all<bf16>(*isa.kernels, "bf16");
    test::all<f16>(*isa.kernels, "f16");
    test::refuse_bad_indices(*isa.kernels);
    std::printf("%s: %d failures\n", isa.name, test::failures);
    return test::failures ? 1 : 0;
  }
  std::fprintf(stderr, "no variant %s in this build\n", argv[1]);
  return 2;
}
