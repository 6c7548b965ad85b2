// Copies that land later than they are issued, and the mbarriers that tell of them.
//
// A copy lands at the latest moment that PTX allows: when its group is waited for, or, for tensor
// copies, when nobody can go on without it (or at any moment, by the launch's seed). Meanwhile the
// bytes are marked, and whoever touches them is reported.
#include "machine.h"

namespace emulator {

void Step::copy() {
  need(in_.sources[0], "an address");
  need(in_.sources[1], "an address");
  lanes([&](int lane) {
    Copy copy{who_, address(in_.sources[1], lane), cut(address(in_.sources[0], lane), 32), 0, 0};
    copy.bytes = copy.valid = static_cast<int>(one(in_.sources[2], lane));
    if (in_.sources.size() > 3)
      copy.valid = std::min(copy.bytes, static_cast<int>(one(in_.sources[3], lane)));
    if (copy.valid) m_.global_.read(who_, copy.from, copy.bytes);
    block_.shared.begin_copy(who_, copy.to, copy.bytes);
    warp_.open_copies.push_back(copy);
  });
}

void Step::wait_for_copies() {
  const auto kept = static_cast<size_t>(one(in_.sources[0], 0));
  for (; warp_.copies.size() > kept; warp_.copies.pop_front()) {
    for (const Copy& copy : warp_.copies.front()) {
      u8 value[16] = {};
      if (copy.valid) std::memcpy(value, reinterpret_cast<const u8*>(copy.from), copy.valid);
      block_.shared.finish_copy(who_, copy.to, copy.bytes, value);
    }
  }
}

void Step::mbarrier() {
  lanes([&](int lane) {
    const u64 at = cut(address(in_.sources[0], lane), 32);
    Mbarrier& mbarrier = block_.mbarriers[at];
    if (in_.op == Op::kMbarrierInit) {
      const u8 agent = mbarrier.agent
                           ? mbarrier.agent
                           : static_cast<u8>(kFirstMbarrier + block_.mbarriers.size() - 1);
      if (agent >= kAgents)
        throw Fault("more mbarriers than the emulator has clocks for; " + place(who_));
      const auto count = static_cast<i64>(one(in_.sources[1], lane));
      const u32 landed = mbarrier.landed;
      mbarrier = Mbarrier{};
      mbarrier.valid = true;
      mbarrier.count = mbarrier.pending = count;
      mbarrier.agent = agent;
      mbarrier.landed = landed;
      block_.shared.write(who_, at, 8, nullptr);
      return;
    }
    if (!mbarrier.valid)
      throw Fault("invalid mbarrier: none was made at byte " + std::to_string(at) + "; " +
                  place(who_));
    if (in_.op == Op::kMbarrierInvalidate) {
      block_.shared.write(who_, at, 8, nullptr);
      mbarrier.valid = false;
      return;
    }
    block_.shared.read(who_, at, 8);  // it was made before
    if (in_.op == Op::kMbarrierExpect)
      mbarrier.bytes += static_cast<i64>(one(in_.sources[1], lane));
    if (--mbarrier.pending < 0)
      throw Fault("invalid mbarrier: more arrivals than it counts; " + place(who_));
    join(&mbarrier.arriving, warp_.now);
    ++warp_.now[warp_.agent()];
    m_.arrived(&mbarrier);
  });
  m_.release(&block_);
}

bool Step::wait_for_mbarrier() {
  whole_warp();
  const u64 at = cut(address(in_.sources[0], 0), 32);
  const auto found = block_.mbarriers.find(at);
  if (found == block_.mbarriers.end() || !found->second.valid) {
    throw Fault("invalid mbarrier: none was made at byte " + std::to_string(at) + "; " +
                place(who_));
  }
  const auto parity = static_cast<int>(one(in_.sources[1], 0) & 1);
  if (found->second.phase == parity) {
    warp_.state = Warp::kAtMbarrier;
    warp_.waits_at = &in_;
    warp_.barrier = at;
    warp_.parity = parity;
    return false;
  }
  block_.shared.read(who_, at, 8);
  join(&warp_.now, found->second.complete);
  lanes([&](int lane) { put(in_.to, lane, 1); });
  return true;
}

void Step::tensor_copy() {
  lanes([&](int lane) {
    const Operand& source = in_.sources[1];
    const auto* map = reinterpret_cast<const TensorMap*>(address(source, lane));
    const Operand& coordinates = source.parts[1];
    TensorCopy copy{who_,
                    map,
                    cut(address(in_.sources[0], lane), 32),
                    cut(address(in_.sources[2], lane), 32),
                    extend(one(coordinates.parts[0], lane), 32),
                    extend(one(coordinates.parts[1], lane), 32),
                    warp_.now};
    if (map->magic != TensorMap::kMagic) throw Fault("no tensor map of rank 2; " + place(who_));
    if (copy.to % 128)
      throw Fault("misaligned: a tensor copy to byte " + std::to_string(copy.to) + "; " +
                  place(who_));
    const auto found = block_.mbarriers.find(copy.mbarrier);
    if (found == block_.mbarriers.end() || !found->second.valid) {
      throw Fault("invalid mbarrier: none was made at byte " + std::to_string(copy.mbarrier) +
                  "; " + place(who_));
    }
    block_.shared.read(who_, copy.mbarrier, 8);
    block_.shared.begin_copy(who_, copy.to,
                             static_cast<int>(map->box[0] * map->box[1] * map->element_bytes));
    block_.tensor_copies.push_back(copy);
  });
}

}  // namespace emulator
