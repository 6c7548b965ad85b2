// Products of matrices: by one warp at once, and by warp groups whose result comes later.
#include <algorithm>
#include <type_traits>

#include "machine.h"

namespace emulator {
namespace {

// Elements of a product's operands: both bf16 or both fp16 with sums in fp32, or both s8 with sums
// in s32. A register holds two or four that lie together, and an instruction sums over eight times
// as many.
enum class Element { kNone, kBf16, kF16, kS8 };

int in_word(Element element) { return element == Element::kS8 ? 4 : 2; }
int depth_of(Element element) { return 8 * in_word(element); }
std::string suffix_of(Element element) { return "k" + std::to_string(depth_of(element)); }

Element element_of(const Instruction& in) {
  std::vector<std::string> types;
  for (const auto& word : in.words) {
    if (word == "f32" || word == "bf16" || word == "f16" || word == "s32" || word == "s8")
      types.push_back(word);
  }
  if (types.size() < 3 || types.size() > 4 || types[1] != types[2]) return Element::kNone;
  if (types.size() == 4 && types[3] != types[0]) return Element::kNone;
  if (types[0] == "s32") return types[1] == "s8" ? Element::kS8 : Element::kNone;
  if (types[0] != "f32") return Element::kNone;
  return types[1] == "bf16" ? Element::kBf16 : types[1] == "f16" ? Element::kF16 : Element::kNone;
}

template <class Sum>
Sum element_at(Element element, u64 word, int which) {
  if constexpr (std::is_same_v<Sum, float>) {
    return element == Element::kBf16 ? from_bf16(word >> 16 * which)
                                     : from_f16(word >> 16 * which & 0xffff);
  } else {
    return static_cast<Sum>(extend(word >> 8 * which, 8));
  }
}

// What an instruction leaves of a register's sum and of its own, which is exact in 32 bits.
u64 added(const Instruction&, u64 before, float own) { return of(f32(before) + own); }
u64 added(const Instruction& in, u64 before, int32_t own) {
  i64 sum = extend(before, 32) + own;
  if (in.has("satfinite")) sum = std::clamp<i64>(sum, INT32_MIN, INT32_MAX);
  return cut(static_cast<u64>(sum), 32);
}

}  // namespace

void Step::multiply() {
  whole_warp();
  const Element element = element_of(in_);
  if (element == Element::kNone || !in_.has(("m16n8" + suffix_of(element)).c_str()) ||
      !in_.has("row") || !in_.has("col"))
    unknown();
  const int together = in_word(element);
  const auto compute = [&](auto zero) {
    using Sum = decltype(zero);
    const int depth = 8 * together;
    Sum a[16][32], b[32][8], sums[16][8] = {};
    const auto &as = in_.sources[0].parts, &bs = in_.sources[1].parts, &cs = in_.sources[2].parts;
    u64 scratch[6][kLanes], before[4][kLanes];
    const u64* sources[6];
    for (int i = 0; i < 4; ++i) sources[i] = row(as[i], scratch[i]);
    for (int i = 0; i < 2; ++i) sources[4 + i] = row(bs[i], scratch[4 + i]);
    for (auto& each : before) {  // the results may be written where these are
      const u64* const from = row(cs[&each - before], each);
      if (from != each) std::copy(from, from + kLanes, each);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int j = 0; j < together; ++j) {
        const int k = t * together + j;
        for (int i = 0; i < 4; ++i)
          a[g + i % 2 * 8][k + i / 2 * depth / 2] = element_at<Sum>(element, sources[i][lane], j);
        for (int i = 0; i < 2; ++i)
          b[k + i * depth / 2][g] = element_at<Sum>(element, sources[4 + i][lane], j);
      }
    }
    for (int i = 0; i < 16; ++i) {
      for (int q = 0; q < depth; ++q) {
        for (int j = 0; j < 8; ++j) sums[i][j] += a[i][q] * b[q][j];
      }
    }
    all_or_none();
    for (int i = 0; i < 4; ++i) {
      u64* const to = result(in_.to.parts[i]);
      for (int lane = 0; lane < kLanes; ++lane)
        to[lane] = added(in_, before[i][lane], sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
    }
  };
  element == Element::kS8 ? compute(int32_t{}) : compute(float{});
}

// Visits a matrix of `rows` x `depth` that a descriptor names, 16 bytes that lie together at a
// time: visit(row, column, address), along the columns, or along the rows of a transposed one.
template <class Visit>
void Step::tile_of(u64 descriptor, int rows, int depth, bool transposed, Visit visit) const {
  const u64 start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  const u64 stride = (descriptor >> 32 & 0x3fff) << 4, mode = descriptor >> 62;
  if (descriptor >> 49 & 7) unknown();             // a base offset
  const u64 width = mode == 0 ? 16 : 256 >> mode;  // bytes of a swizzled line
  const auto swizzled = [&](u64 at) {
    return mode == 0 ? at : at ^ (at >> 7 & (width / 16 - 1)) << 4;
  };
  if (transposed) {
    for (int row = 0; row < rows; row += 8) {
      for (int k = 0; k < 16; ++k) {
        const u64 bytes = static_cast<u64>(row) * 2;
        visit(row, k,
              swizzled(start + bytes / width * leading + bytes % width + k % 8 * width +
                       k / 8 * stride));
      }
    }
  } else {
    for (int row = 0; row < rows; ++row) {
      for (int k = 0; k < depth; k += depth / 2) {
        const u64 bytes = k == 0 ? 0 : 16;
        visit(row, k,
              swizzled(start + row / 8 * stride + row % 8 * width + bytes % width +
                       bytes / width * leading));
      }
    }
  }
}

// Whether an operand in shared memory is transposed; those of s8 never are, and have no flag.
bool Step::transposed(const Instruction& in, bool first) const {
  return element_of(in) != Element::kS8 && one(first ? in.sources[5] : in.sources.back(), 0) != 0;
}

void Step::group_multiply() {
  whole_warp();
  const bool a_in_registers = in_.sources[0].kind == Operand::kVector;
  const int columns = static_cast<int>(in_.to.parts.size()) * 2;
  const Element element = element_of(in_);
  const std::string shape = "m64n" + std::to_string(columns) + suffix_of(element);
  if (element == Element::kNone || !in_.has(shape.c_str())) unknown();
  if (element != Element::kS8 && (one(in_.sources[3], 0) != 1 || one(in_.sources[4], 0) != 1))
    unknown();  // scales of the operands
  GroupProduct product{&in_, {}, 0, one(in_.sources[1], 0), (one(in_.sources[2], 0) & 1) != 0};
  const auto unfenced = [&](const Operand& operand) {
    if (warp_.changed[operand.index] > warp_.fenced) {
      throw Fault(
          "unfenced: a product uses a register that was written after the last wgmma.fence; " +
          place(who_));
    }
  };
  const auto reads = [&](int, int, u64 at) {
    block_.shared.begin_product(who_, at, 16);
    if (!block_.shared.defined(at, 16)) {
      throw Fault("uninitialised: a product reads shared memory that nobody wrote; " + place(who_));
    }
  };
  need(in_.sources[0], "a product's operand");
  need(in_.sources[1], "a product's operand");
  if (a_in_registers) {
    for (const Operand& part : in_.sources[0].parts) {
      unfenced(part);
      u64 scratch[kLanes];
      const u64* const values = row(part, scratch);
      product.a.insert(product.a.end(), values, values + kLanes);
    }
  } else {
    product.a_descriptor = one(in_.sources[0], 0);
    tile_of(product.a_descriptor, 64, depth_of(element), transposed(in_, true),
            [&](int row, int k, u64 at) {
              if (row / 16 == warp_.id % 4) reads(row, k, at);
            });
  }
  tile_of(product.b_descriptor, columns, depth_of(element), transposed(in_, false), reads);
  for (const Operand& part : in_.to.parts) {
    if (warp_.computing[part.index]) {
      ++warp_.computing[part.index];  // the same accumulators in order
      continue;
    }
    unfenced(part);
    if (product.accumulates) need(part, "a sum");
    warp_.computing[part.index] = 1;
  }
  warp_.open_products.push_back(std::move(product));
}

void Step::finish_products(size_t kept) {
  for (; warp_.products.size() > kept; warp_.products.pop_front()) {
    for (const GroupProduct& product : warp_.products.front()) compute(product);
  }
}

void Step::compute(const GroupProduct& product) {
  element_of(*product.in) == Element::kS8 ? compute_as<int32_t>(product)
                                          : compute_as<float>(product);
}

template <class Sum>
void Step::compute_as(const GroupProduct& product) {
  const Instruction& in = *product.in;
  const Element element = element_of(in);
  const int columns = static_cast<int>(in.to.parts.size()) * 2;
  const int together = in_word(element), depth = depth_of(element);
  Sum a[16][32];
  std::vector<Sum> b(depth * static_cast<size_t>(columns));
  const auto elements = [&](u64 at, auto store) {
    block_.shared.finish_product(who_, at, 16);
    u32 words[4];
    std::memcpy(words, block_.shared.at(at), 16);
    for (int i = 0; i < 4 * together; ++i)
      store(i, element_at<Sum>(element, words[i / together], i % together));
  };
  if (product.a.empty()) {
    const bool along_rows = transposed(in, true);
    tile_of(product.a_descriptor, 64, depth, along_rows, [&](int row, int k, u64 at) {
      if (row / 16 != warp_.id % 4) return;
      elements(at, [&](int i, Sum value) {
        a[(row + (along_rows ? i : 0)) % 16][k + (along_rows ? 0 : i)] = value;
      });
    });
  } else {
    for (int i = 0; i < 4; ++i) {
      u64 scratch[kLanes];
      if (!std::equal(&product.a[i * kLanes], &product.a[i * kLanes] + kLanes,
                      row(in.sources[0].parts[i], scratch))) {
        throw Fault(
            "unfinished: a register of a product was written before the product was waited for; " +
            place({who_.kernel, &in, who_.now, who_.agent, who_.block}));
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int j = 0; j < together; ++j) {
          a[lane / 4 + i % 2 * 8][lane % 4 * together + j + i / 2 * depth / 2] =
              element_at<Sum>(element, product.a[i * kLanes + lane], j);
        }
      }
    }
  }
  const bool along_rows = transposed(in, false);
  tile_of(product.b_descriptor, columns, depth, along_rows, [&](int row, int k, u64 at) {
    elements(at, [&](int i, Sum value) {
      b[(k + (along_rows ? 0 : i)) * columns + row + (along_rows ? i : 0)] = value;
    });
  });
  std::vector<Sum> sums(16 * static_cast<size_t>(columns));
  for (int i = 0; i < 16; ++i) {
    Sum* const own = &sums[i * columns];
    for (int q = 0; q < depth; ++q) {
      for (int n = 0; n < columns; ++n) own[n] += a[i][q] * b[q * columns + n];
    }
  }
  for (size_t part = 0; part < in.to.parts.size(); ++part) {
    const int index = in.to.parts[part].index;
    u64* const to = &warp_.registers[static_cast<size_t>(index) * kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const size_t at =
          (lane / 4 + part / 2 % 2 * 8) * columns + part / 4 * 8 + lane % 4 * 2 + part % 2;
      to[lane] = added(in, product.accumulates ? to[lane] : 0, sums[at]);
    }
    warp_.defined[index] = kAllLanes;
    --warp_.computing[index];
  }
}

}  // namespace emulator
