// Products of matrices: by one warp at once, and by warp groups whose result comes later.
#include <algorithm>

#include "machine.h"

namespace emulator {
namespace {

struct Halves {
  bool bfloat;

  float at(u64 value, int which) const {
    return bfloat ? from_bf16(value >> 16 * which) : from_f16(value >> 16 * which & 0xffff);
  }
};

// Both operands bf16 or both fp16, sums in fp32.
bool kind_of(const Instruction& in, Halves* halves) {
  std::vector<std::string> types;
  for (const auto& word : in.words) {
    if (word == "f32" || word == "bf16" || word == "f16") types.push_back(word);
  }
  if (types.size() < 3 || types[0] != "f32" || types[1] != types[2] || types[1] == "f32")
    return false;
  halves->bfloat = types[1] == "bf16";
  return types.size() == 3 || types[3] == "f32";
}

}  // namespace

void Step::multiply() {
  whole_warp();
  Halves halves{};
  if (!in_.has("m16n8k16") || !in_.has("row") || !in_.has("col") || !kind_of(in_, &halves))
    unknown();
  float a[16][16], b[16][8], c[16][8];
  const auto &as = in_.sources[0].parts, &bs = in_.sources[1].parts, &cs = in_.sources[2].parts;
  u64 scratch[10][kLanes];
  const u64* sources[10];
  for (int i = 0; i < 4; ++i) sources[i] = row(as[i], scratch[i]);
  for (int i = 0; i < 2; ++i) sources[4 + i] = row(bs[i], scratch[4 + i]);
  for (int i = 0; i < 4; ++i) sources[6 + i] = row(cs[i], scratch[6 + i]);
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4 * 2;
    for (int j = 0; j < 2; ++j) {
      for (int i = 0; i < 4; ++i)
        a[g + i % 2 * 8][t + j + i / 2 * 8] = halves.at(sources[i][lane], j);
      for (int i = 0; i < 2; ++i) b[t + j + i * 8][g] = halves.at(sources[4 + i][lane], j);
      for (int i = 0; i < 2; ++i) c[g + i * 8][t + j] = f32(sources[6 + 2 * i + j][lane]);
    }
  }
  for (int i = 0; i < 16; ++i) {
    float sums[8] = {};
    for (int q = 0; q < 16; ++q) {
      for (int j = 0; j < 8; ++j) sums[j] += a[i][q] * b[q][j];
    }
    for (int j = 0; j < 8; ++j) c[i][j] += sums[j];
  }
  all_or_none();
  for (int i = 0; i < 4; ++i) {
    u64* const to = result(in_.to.parts[i]);
    for (int lane = 0; lane < kLanes; ++lane)
      to[lane] = of(c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
  }
}

// Visits a matrix of `rows` x 16 that a descriptor names, eight elements that lie together at a
// time: visit(row, column, address), along the columns, or along the rows of a transposed one.
template <class Visit>
void Step::tile_of(u64 descriptor, int rows, bool transposed, Visit visit) const {
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
      for (int k = 0; k < 16; k += 8) {
        const u64 bytes = static_cast<u64>(k) * 2;
        visit(row, k,
              swizzled(start + row / 8 * stride + row % 8 * width + bytes % width +
                       bytes / width * leading));
      }
    }
  }
}

void Step::group_multiply() {
  whole_warp();
  const bool a_in_registers = in_.sources[0].kind == Operand::kVector;
  const int columns = static_cast<int>(in_.to.parts.size()) * 2;
  Halves halves{};
  if (!in_.has(("m64n" + std::to_string(columns) + "k16").c_str()) || !kind_of(in_, &halves))
    unknown();
  if (one(in_.sources[3], 0) != 1 || one(in_.sources[4], 0) != 1)
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
    tile_of(product.a_descriptor, 64, one(in_.sources[5], 0) != 0, [&](int row, int k, u64 at) {
      if (row / 16 == warp_.id % 4) reads(row, k, at);
    });
  }
  tile_of(product.b_descriptor, columns, one(in_.sources.back(), 0) != 0, reads);
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
  const Instruction& in = *product.in;
  const int columns = static_cast<int>(in.to.parts.size()) * 2;
  Halves halves{};
  kind_of(in, &halves);
  float a[16][16];
  std::vector<float> b(16 * static_cast<size_t>(columns));
  const auto elements = [&](u64 at, auto store) {
    block_.shared.finish_product(who_, at, 16);
    u16 values[8];
    std::memcpy(values, block_.shared.at(at), 16);
    for (int i = 0; i < 8; ++i) store(i, halves.at(values[i], 0));
  };
  if (product.a.empty()) {
    const bool transposed = one(in.sources[5], 0) != 0;
    tile_of(product.a_descriptor, 64, transposed, [&](int row, int k, u64 at) {
      if (row / 16 != warp_.id % 4) return;
      elements(at, [&](int i, float value) {
        a[(row + (transposed ? i : 0)) % 16][k + (transposed ? 0 : i)] = value;
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
        for (int j = 0; j < 2; ++j) {
          a[lane / 4 + i % 2 * 8][lane % 4 * 2 + j + i / 2 * 8] =
              halves.at(product.a[i * kLanes + lane], j);
        }
      }
    }
  }
  const bool transposed = one(in.sources.back(), 0) != 0;
  tile_of(product.b_descriptor, columns, transposed, [&](int row, int k, u64 at) {
    elements(at, [&](int i, float value) {
      b[(k + (transposed ? 0 : i)) * columns + row + (transposed ? i : 0)] = value;
    });
  });
  std::vector<float> sums(16 * static_cast<size_t>(columns));
  for (int i = 0; i < 16; ++i) {
    float* const own = &sums[i * columns];
    for (int q = 0; q < 16; ++q) {
      for (int n = 0; n < columns; ++n) own[n] += a[i][q] * b[q * columns + n];
    }
  }
  for (size_t part = 0; part < in.to.parts.size(); ++part) {
    const int index = in.to.parts[part].index;
    u64* const to = &warp_.registers[static_cast<size_t>(index) * kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const size_t at =
          (lane / 4 + part / 2 % 2 * 8) * columns + part / 4 * 8 + lane % 4 * 2 + part % 2;
      to[lane] = of((product.accumulates ? f32(to[lane]) : 0.0f) + sums[at]);
    }
    warp_.defined[index] = kAllLanes;
    --warp_.computing[index];
  }
}

}  // namespace emulator
