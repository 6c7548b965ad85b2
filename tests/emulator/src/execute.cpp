// What an instruction does, apart from arithmetic: operands, memory, and lanes among each other.
#include <algorithm>

#include "machine.h"

namespace emulator {

bool Step::execute() {
  switch (in_.op) {
    case Op::kNothing:
    case Op::kWarpBarrier:
      return true;
    case Op::kCompare:
      return compare(), true;
    case Op::kConvert:
      return convert(), true;
    case Op::kMove:
      return move(), true;
    case Op::kLoad:
      return load(), true;
    case Op::kStore:
      return store(), true;
    case Op::kAtomic:
      return atomic(), true;
    case Op::kLoadMatrix:
    case Op::kStoreMatrix:
      return matrices(in_.op == Op::kLoadMatrix), true;
    case Op::kShuffle:
      return shuffle(), true;
    case Op::kReduce:
      return reduce(), true;
    case Op::kVote:
      return vote(), true;
    case Op::kElect: {
      const int first = __builtin_ctz(here_);
      lanes([&](int lane) {
        put(in_.to, lane, static_cast<u64>(first));
        put(in_.second, lane, lane == first);
      });
      return true;
    }
    case Op::kMultiply:
      return multiply(), true;
    case Op::kBarrier:
    case Op::kBarrierReduce:
      return barrier();
    case Op::kCopy:
      return copy(), true;
    case Op::kCopyCommit:
      warp_.copies.push_back(std::move(warp_.open_copies));
      warp_.open_copies.clear();
      return true;
    case Op::kCopyWait:
      return wait_for_copies(), true;
    case Op::kMbarrierInit:
    case Op::kMbarrierInvalidate:
    case Op::kMbarrierArrive:
    case Op::kMbarrierExpect:
      return mbarrier(), true;
    case Op::kMbarrierWait:
      return wait_for_mbarrier();
    case Op::kTensorCopy:
      return tensor_copy(), true;
    case Op::kGroupFence:
      warp_.fenced = warp_.executed;
      return true;
    case Op::kGroupMultiply:
      return group_multiply(), true;
    case Op::kGroupCommit:
      warp_.products.push_back(std::move(warp_.open_products));
      warp_.open_products.clear();
      return true;
    case Op::kGroupWait:
      return finish_products(static_cast<size_t>(one(in_.sources[0], 0))), true;
    default:
      return arithmetic(), true;
  }
}

const u64* Step::row(const Operand& operand, u64* scratch) const {
  switch (operand.kind) {
    case Operand::kConstant:
      return &m_.kernel_.constants[static_cast<size_t>(operand.index) * kLanes];
    case Operand::kParameter:
      std::fill_n(scratch, kLanes,
                  reinterpret_cast<u64>(m_.launch_.parameters.data()) +
                      m_.kernel_.parameters[operand.index].offset);
      return scratch;
    case Operand::kRegister:
      break;
    default:
      unknown();
  }
  if (warp_.computing[operand.index]) {
    throw Fault("unfinished: reads a register that a product will write; " + place(who_));
  }
  defined_ &= warp_.defined[operand.index];
  const u64* const values = &warp_.registers[static_cast<size_t>(operand.index) * kLanes];
  if (!operand.negated) return values;
  for (int lane = 0; lane < kLanes; ++lane) scratch[lane] = !(values[lane] & 1);
  return scratch;
}

u64 Step::one(const Operand& operand, int lane) const {
  u64 scratch[kLanes];
  return row(operand, scratch)[lane];
}

u64* Step::result(const Operand& operand) {
  static thread_local u64 sink[kLanes];
  if (operand.kind == Operand::kSink) return sink;
  if (operand.kind != Operand::kRegister) unknown();
  if (warp_.computing[operand.index]) {
    throw Fault("unfinished: writes a register that a product will write; " + place(who_));
  }
  u32& defined = warp_.defined[operand.index];
  defined = (defined & ~active_) | (defined_ & active_);
  warp_.changed[operand.index] = warp_.executed;
  return &warp_.registers[static_cast<size_t>(operand.index) * kLanes];
}

void Step::put(const Operand& operand, int lane, u64 value) { result(operand)[lane] = value; }

// What may not hang on memory or registers that nobody wrote: addresses, and what leaves the block.
void Step::need(const Operand& operand, const char* what) const {
  if (operand.kind == Operand::kVector) {
    for (const Operand& part : operand.parts) need(part, what);
  } else if (operand.kind == Operand::kMemory) {
    need(operand.parts[0], what);
  } else if (operand.kind == Operand::kRegister &&
             (warp_.defined[operand.index] & active_) != active_) {
    throw Fault(std::string("uninitialised: ") + what + " hangs on what nobody wrote; " +
                place(who_));
  }
}

u64 Step::address(const Operand& operand, int lane) const {
  return one(operand.parts[0], lane) + static_cast<u64>(operand.offset);
}

void Step::whole_warp() const {
  if (active_ != kAllLanes) throw Fault("divergent: a part of a warp only; " + place(who_));
}

void Step::unknown() const {
  throw Fault("unknown instruction, line " + std::to_string(in_.line) + ": " + in_.text);
}

void Step::load() {
  const int size = in_.type.bits / 8, bytes = size * in_.vector;
  const Operand& memory = in_.sources[0];
  need(memory, "an address");
  u64 scratch[kLanes], bases[kLanes], values[8][kLanes];
  std::copy_n(row(memory.parts[0], scratch), kLanes, bases);
  u32 defined[8];
  std::fill_n(defined, 8, kAllLanes);
  lanes([&](int lane) {
    const u64 at = bases[lane] + static_cast<u64>(memory.offset);
    const bool is_shared = in_.space == Space::kShared;
    const u8* from = in_.space == Space::kParameter ? reinterpret_cast<const u8*>(at)
                     : is_shared                    ? block_.shared.read(who_, cut(at, 32), bytes)
                                                    : m_.global_.read(who_, at, bytes);
    for (int i = 0; i < in_.vector; ++i, from += size) {
      u64 value = 0;
      std::memcpy(&value, from, size);
      values[i][lane] =
          in_.type.kind == 's' ? static_cast<u64>(extend(value, in_.type.bits)) : value;
      if (is_shared && !block_.shared.defined(cut(at, 32) + i * size, size))
        defined[i] &= ~(1u << lane);
    }
  });
  for (int i = 0; i < in_.vector; ++i) {
    defined_ = defined[i];
    u64* const to = result(in_.vector > 1 ? in_.to.parts[i] : in_.to);
    lanes([&](int lane) { to[lane] = values[i][lane]; });
  }
}

void Step::store() {
  const int size = in_.type.bits / 8, bytes = size * in_.vector;
  const bool is_shared = in_.space == Space::kShared;
  need(in_.sources[0], "an address");
  if (!is_shared) need(in_.sources[1], "what is stored");
  u64 scratch[9][kLanes];
  const u64* const bases = row(in_.sources[0].parts[0], scratch[8]);
  const u64* values[8];
  u32 defined[8];
  for (int i = 0; i < in_.vector; ++i) {
    defined_ = kAllLanes;
    values[i] = row(in_.vector > 1 ? in_.sources[1].parts[i] : in_.sources[1], scratch[i]);
    defined[i] = defined_;
  }
  lanes([&](int lane) {
    const u64 at = bases[lane] + static_cast<u64>(in_.sources[0].offset);
    u8 value[64];
    for (int i = 0; i < in_.vector; ++i) std::memcpy(value + i * size, &values[i][lane], size);
    if (!is_shared) {
      m_.global_.write(who_, at, bytes, value);
      return;
    }
    block_.shared.write(who_, cut(at, 32), bytes, value);
    for (int i = 0; i < in_.vector; ++i) {
      block_.shared.define(cut(at, 32) + i * size, size, defined[i] >> lane & 1);
    }
  });
}

// Lanes take their turn in any order.
void Step::atomic() {
  if (!in_.has("add")) unknown();
  need(in_.sources[0], "an address");
  need(in_.sources[1], "what is added");
  std::vector<int> order;
  lanes([&](int lane) { order.push_back(lane); });
  std::shuffle(order.begin(), order.end(), m_.random_);
  const int bits = in_.type.bits, bytes = bits / 8;
  for (const int lane : order) {
    const u64 at = address(in_.sources[0], lane), operand = one(in_.sources[1], lane);
    const bool is_shared = in_.space == Space::kShared;
    u64 old = 0;
    u8* const memory = is_shared ? block_.shared.write(who_, cut(at, 32), bytes, nullptr, true)
                                 : m_.global_.write(who_, at, bytes, nullptr, true);
    if (is_shared && !block_.shared.defined(cut(at, 32), bytes)) {
      throw Fault("uninitialised: adds to shared memory that nobody wrote; " + place(who_));
    }
    std::memcpy(&old, memory, bytes);
    u64 sum = old + operand;
    if (in_.type.is_float()) {
      if (bits != 32) unknown();
      sum = of(f32(old) + f32(operand));
    }
    std::memcpy(memory, &sum, bytes);
    put(in_.to, lane, old);
  }
}

// Tiles of 8 rows of 16 bytes: a lane names a row and holds two 16-bit elements of each tile.
void Step::matrices(bool loads) {
  whole_warp();
  if (!in_.has("m8n8") || !in_.has("b16")) unknown();
  const Operand &memory = in_.sources[0], &list = loads ? in_.to : in_.sources[1];
  const bool transposed = in_.has("trans");
  need(memory, "an address");
  u64 scratch[kLanes], bases[kLanes];
  std::copy_n(row(memory.parts[0], scratch), kLanes, bases);
  const auto tiles = list.kind == Operand::kVector ? list.parts : std::vector<Operand>{list};
  for (size_t tile = 0; tile < tiles.size(); ++tile) {
    u8 rows[8][16];
    const auto element = [&](int lane, int j) {
      return transposed ? &rows[lane % 4 * 2 + j][lane / 4 * 2]
                        : &rows[lane / 4][lane % 4 * 4 + 2 * j];
    };
    const auto at = [&](int r) {
      return cut(bases[tile * 8 + r] + static_cast<u64>(memory.offset), 32);
    };
    if (loads) {
      defined_ = kAllLanes;
      for (int r = 0; r < 8; ++r) {
        std::memcpy(rows[r], block_.shared.read(who_, at(r), 16), 16);
        if (!block_.shared.defined(at(r), 16)) defined_ = 0;
      }
      u64* const to = result(tiles[tile]);
      for (int lane = 0; lane < kLanes; ++lane) {
        u16 two[2];
        for (int j = 0; j < 2; ++j) std::memcpy(&two[j], element(lane, j), 2);
        to[lane] = two[0] | static_cast<u64>(two[1]) << 16;
      }
    } else {
      u64 own[kLanes];
      defined_ = kAllLanes;
      const u64* const values = row(tiles[tile], own);
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int j = 0; j < 2; ++j) {
          const auto half = static_cast<u16>(values[lane] >> 16 * j);
          std::memcpy(element(lane, j), &half, 2);
        }
      }
      for (int r = 0; r < 8; ++r) {
        block_.shared.write(who_, at(r), 16, rows[r]);
        block_.shared.define(at(r), 16, defined_ == kAllLanes);
      }
    }
  }
}

void Step::shuffle() {
  whole_warp();
  u64 scratch[3][kLanes], values[kLanes], made[kLanes];
  std::copy_n(row(in_.sources[0], scratch[0]), kLanes, values);
  const u32 sources = defined_;
  const u64* const amounts = row(in_.sources[1], scratch[1]);
  const u64* const clamps = row(in_.sources[2], scratch[2]);
  bool inside[kLanes];
  u32 defined = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int by = static_cast<int>(amounts[lane] & 31),
              clamp = static_cast<int>(clamps[lane] & 31);
    const int segment = static_cast<int>(clamps[lane] >> 8 & 31);
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int source = 0;
    if (in_.compare == "up")
      source = lane - by, inside[lane] = source >= last;
    else if (in_.compare == "down")
      source = lane + by, inside[lane] = source <= last;
    else if (in_.compare == "bfly")
      source = lane ^ by, inside[lane] = source <= last;
    else if (in_.compare == "idx")
      source = first | (by & ~segment), inside[lane] = source <= last;
    else
      unknown();
    if (!inside[lane]) source = lane;
    made[lane] = cut(values[source], 32);
    defined |= (sources >> source & 1) << lane;
  }
  defined_ = defined;
  std::copy_n(made, kLanes, result(in_.to));
  if (in_.second.kind != Operand::kNone) std::copy_n(inside, kLanes, result(in_.second));
}

void Step::reduce() {
  whole_warp();
  u64 scratch[kLanes];
  const u64* const values = row(in_.sources[0], scratch);
  const auto number = [&](int lane) {
    return in_.type.kind == 's' ? extend(values[lane], 32)
                                : static_cast<i64>(cut(values[lane], 32));
  };
  i64 all = number(0);
  for (int lane = 1; lane < kLanes; ++lane) {
    const i64 next = number(lane);
    if (in_.compare == "add")
      all += next;
    else if (in_.compare == "max")
      all = std::max(all, next);
    else if (in_.compare == "min")
      all = std::min(all, next);
    else if (in_.compare == "or")
      all |= next;
    else if (in_.compare == "and")
      all &= next;
    else if (in_.compare == "xor")
      all ^= next;
    else
      unknown();
  }
  all_or_none();
  std::fill_n(result(in_.to), kLanes, cut(static_cast<u64>(all), 32));
}

void Step::vote() {
  whole_warp();
  if (in_.compare != "ballot") unknown();
  u64 scratch[kLanes], votes = 0;
  const u64* const values = row(in_.sources[0], scratch);
  for (int lane = 0; lane < kLanes; ++lane) votes |= (values[lane] & 1) << lane;
  all_or_none();
  std::fill_n(result(in_.to), kLanes, votes);
}

bool Step::barrier() {
  whole_warp();
  warp_.state = Warp::kAtBarrier;
  warp_.waits_at = &in_;
  need(in_.sources.back(), "a barrier");
  warp_.barrier = one(in_.sources[0], 0);
  const bool reduces = in_.op == Op::kBarrierReduce;
  const size_t counted = reduces ? 2 : 1;  // a number of threads may follow
  warp_.expected = static_cast<int>(block_.warps.size());
  if (in_.sources.size() > counted) {
    warp_.expected = static_cast<int>(one(in_.sources[1], 0)) / kLanes;
  }
  if (reduces) {
    if (!in_.has("or") && !in_.has("and")) unknown();
    u64 scratch[kLanes];
    const u64* const values = row(in_.sources.back(), scratch);
    warp_.vote = 0;
    for (int lane = 0; lane < kLanes; ++lane)
      warp_.vote |= static_cast<u32>(values[lane] & 1) << lane;
  }
  return false;
}

}  // namespace emulator
