// Turns of blocks and warps, barriers, and who waits for whom when nobody can go on.
#include "machine.h"

#include <algorithm>
#include <numeric>

namespace emulator {
namespace {

std::string join_lines(const std::vector<std::string>& lines) {
  std::string text;
  for (const auto& line : lines) text += (text.empty() ? "" : "\n") + line;
  return text;
}

}  // namespace

Machine::Machine(const Kernel& kernel, Launch launch, const std::map<u64, u64>& ranges, u64 seed,
                 u64 most_instructions)
    : kernel_(kernel),
      launch_(std::move(launch)),
      global_(ranges, &findings_),
      random_(seed),
      eager_(random_() % 2),
      most_instructions_(most_instructions) {}

std::unique_ptr<Block> Machine::make_block(u64 number) {
  const size_t bytes = kernel_.static_shared + launch_.dynamic_shared;
  auto block = std::unique_ptr<Block>(
      new Block{static_cast<u32>(number + 1), {}, SharedMemory(bytes, &findings_), {}, {}});
  block->warps.resize(launch_.threads / kLanes);
  const u32* grid = launch_.grid;
  for (auto& warp : block->warps) {
    warp.id = static_cast<int>(&warp - block->warps.data());
    warp.registers.assign(static_cast<size_t>(kernel_.registers) * kLanes, 0xdeadbeefdeadbeefull);
    warp.defined.assign(kernel_.registers, 0);
    warp.computing.assign(kernel_.registers, 0);
    warp.changed.assign(kernel_.registers, 0);
    warp.now[warp.agent()] = 1;
    for (int special = 0; special < kSpecials; ++special) {
      warp.defined[special] = kAllLanes;
      for (int lane = 0; lane < kLanes; ++lane) {
        const u64 values[kSpecials] = {static_cast<u64>(warp.id) * kLanes + lane,
                                       static_cast<u64>(launch_.threads),
                                       number % grid[0],
                                       number / grid[0] % grid[1],
                                       number / grid[0] / grid[1],
                                       grid[0],
                                       grid[1],
                                       grid[2],
                                       static_cast<u64>(lane),
                                       static_cast<u64>(warp.id),
                                       0};
        warp.registers[special * kLanes + lane] = values[special];
      }
    }
  }
  return block;
}

void Machine::run() {
  try {
    run_blocks();
  } catch (const Fault& fault) {  // which may be what an earlier finding came to
    auto lines = findings_.all();
    lines.push_back(fault.what());
    throw Fault(join_lines(lines));
  }
  if (!findings_.all().empty()) throw Fault(join_lines(findings_.all()));
}

void Machine::run_blocks() {
  const u64 total = u64{launch_.grid[0]} * launch_.grid[1] * launch_.grid[2];
  std::vector<u64> order(total);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_);
  std::vector<std::unique_ptr<Block>> live;
  const size_t together = 1 + random_() % 4;
  for (size_t next = 0; next < total || !live.empty();) {
    while (live.size() < together && next < total) live.push_back(make_block(order[next++]));
    auto& block = live[random_() % live.size()];
    turn(block.get());
    const auto& warps = block->warps;
    if (!std::all_of(warps.begin(), warps.end(), [](const Warp& w) { return w.done(); })) continue;
    if (!block->tensor_copies.empty()) {
      throw Fault("unfinished: block " + std::to_string(block->number - 1) + " of " + kernel_.name +
                  " ends while a tensor copy is under way");
    }
    live.erase(std::find(live.begin(), live.end(), block));
  }
}

void Machine::turn(Block* block) {
  if (eager_ && !block->tensor_copies.empty() && random_() % 3 == 0) {
    land(block, random_() % block->tensor_copies.size());
  }
  std::vector<Warp*> can;
  for (auto& warp : block->warps) {
    if (!warp.done() && warp.state == Warp::kRuns) can.push_back(&warp);
  }
  if (can.empty()) {
    if (release(block)) return;
    if (block->tensor_copies.empty()) deadlock(*block);
    land(block, random_() % block->tensor_copies.size());
    return;
  }
  Warp* warp = can[random_() % can.size()];
  for (u64 n = 1 + random_() % 200; n > 0 && !warp->done(); --n) {
    if (!step(block, warp)) break;
  }
  if (warp->state != Warp::kRuns) release(block);
}

// Which lanes go on: of those that need not wait for others the ones furthest behind, for they meet
// the others soonest. Takes lanes that are at one instruction together.
size_t Machine::next_group(Warp* warp) const {
  auto& groups = warp->groups;
  for (size_t i = 0; i < groups.size(); ++i) {
    for (size_t j = groups.size(); j-- > i + 1;) {
      if (groups[i].at != groups[j].at) continue;
      groups[i].lanes |= groups[j].lanes;
      groups.erase(groups.begin() + static_cast<std::ptrdiff_t>(j));
    }
  }
  const auto waits = [&](const Group& group) {
    return group.at < static_cast<int>(kernel_.code.size()) && kernel_.code[group.at].together;
  };
  size_t first = 0;
  for (size_t i = 1; i < groups.size(); ++i) {
    const bool waiting = waits(groups[i]), other = waits(groups[first]);
    if (waiting != other ? other : groups[i].at < groups[first].at) first = i;
  }
  return first;
}

// Executes an instruction; whether the warp may go on to another.
bool Machine::step(Block* block, Warp* warp) {
  auto& groups = warp->groups;
  const size_t first = groups.size() > 1 ? next_group(warp) : 0;
  const u32 here = groups[first].lanes;
  const int at = groups[first].at;
  if (at >= static_cast<int>(kernel_.code.size())) throw Fault(kernel_.name + " runs off its end");
  const Instruction& in = kernel_.code[at];
  u32 active = here;
  if (in.predicate >= 0) {
    const u64* predicate = &warp->registers[static_cast<size_t>(in.predicate) * kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      if ((predicate[lane] & 1) == in.predicate_negated) active &= ~(1u << lane);
    }
    if ((warp->defined[in.predicate] & here) != here) {
      throw Fault("uninitialised: a predicate hangs on what nobody wrote, line " +
                  std::to_string(in.line) + ": " + in.text);
    }
  }
  if (++executed_ > most_instructions_) {
    throw Fault("endless: " + kernel_.name + " executed more than " +
                std::to_string(most_instructions_) + " instructions, the last of them line " +
                std::to_string(in.line) + ": " + in.text);
  }
  ++warp->executed;
  if (in.op == Op::kBranch || in.op == Op::kBranchIndexed || in.op == Op::kReturn) {
    groups[first] = {at + 1, here & ~active};
    if (in.op == Op::kBranch && active) groups.push_back({in.targets[0], active});
    if (in.op == Op::kBranchIndexed) {
      const u64* index = &warp->registers[static_cast<size_t>(in.sources[0].index) * kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        if (active >> lane & 1) groups.push_back({in.targets.at(index[lane]), 1u << lane});
      }
    }
    if (!groups[first].lanes) groups.erase(groups.begin() + static_cast<std::ptrdiff_t>(first));
    return true;
  }
  const bool next = Step(this, block, warp, in, here, active).execute();
  if (next) groups[first].at = at + 1;
  return next;
}

// Lets warps go on whose barrier is complete; whether there were any.
bool Machine::release(Block* block) {
  bool any = false;
  for (auto& warp : block->warps) {
    if (warp.state == Warp::kAtMbarrier) {
      const Mbarrier& mbarrier = block->mbarriers[warp.barrier];
      if (mbarrier.phase == warp.parity) continue;
      warp.state = Warp::kRuns;
      any = true;
    } else if (warp.state == Warp::kAtBarrier) {
      std::vector<Warp*> there;
      for (auto& other : block->warps) {
        if (other.state == Warp::kAtBarrier && other.barrier == warp.barrier)
          there.push_back(&other);
      }
      if (static_cast<int>(there.size()) < warp.expected) continue;
      Clock all{};
      u32 votes = 0, unanimous = kAllLanes;
      for (const Warp* each : there) {
        join(&all, each->now);
        votes |= each->vote;
        unanimous &= each->vote;
      }
      for (Warp* each : there) {
        each->now = all;
        ++each->now[each->agent()];
        each->state = Warp::kRuns;
        for (auto& group : each->groups) ++group.at;
        const Instruction& in = *each->waits_at;
        if (in.op != Op::kBarrierReduce) continue;
        const bool result = in.has("or") ? votes != 0 : unanimous == kAllLanes;
        std::fill_n(&each->registers[static_cast<size_t>(in.to.index) * kLanes], kLanes, result);
        each->defined[in.to.index] = kAllLanes;
      }
      any = true;
    }
  }
  return any;
}

// A tensor copy reaches shared memory, and its mbarrier learns of it.
void Machine::land(Block* block, size_t which) {
  TensorCopy copy = block->tensor_copies[which];
  block->tensor_copies.erase(block->tensor_copies.begin() + static_cast<std::ptrdiff_t>(which));
  const TensorMap& map = *copy.map;
  Mbarrier& mbarrier = block->mbarriers.at(copy.mbarrier);
  if (!mbarrier.valid) throw Fault("invalid mbarrier: a tensor copy lands; " + place(copy.who));
  Clock now = copy.at_issue;
  now[mbarrier.agent] = ++mbarrier.landed;
  copy.who.now = &now;
  copy.who.agent = mbarrier.agent;
  const u32 row = map.box[0] * map.element_bytes;
  for (u32 j = 0; j < map.box[1]; ++j) {
    for (u32 i = 0; i < map.box[0]; ++i) {
      u64 to = copy.to + j * row + i * map.element_bytes;
      if (map.swizzle_bytes) to ^= (to >> 7 & (map.swizzle_bytes / 16 - 1)) << 4;
      u8 value[8] = {};  // what lies outside the matrix is zero
      const i64 x = copy.x + i, y = copy.y + j;
      if (x >= 0 && x < static_cast<i64>(map.sizes[0]) && y >= 0 &&
          y < static_cast<i64>(map.sizes[1])) {
        const u64 from = map.base + y * map.row_bytes + x * map.element_bytes;
        std::memcpy(value, global_.read(copy.who, from, static_cast<int>(map.element_bytes)),
                    map.element_bytes);
      }
      block->shared.finish_copy(copy.who, to, static_cast<int>(map.element_bytes), value);
    }
  }
  join(&mbarrier.arriving, now);
  mbarrier.bytes -= static_cast<i64>(row) * map.box[1];
  arrived(&mbarrier);
  release(block);
}

void Machine::arrived(Mbarrier* mbarrier) {
  if (mbarrier->pending != 0 || mbarrier->bytes != 0) return;
  mbarrier->phase ^= 1;
  mbarrier->pending = mbarrier->count;
  mbarrier->complete = mbarrier->arriving;
}

void Machine::deadlock(const Block& block) const {
  std::vector<std::string> lines = {"deadlock: in block " + std::to_string(block.number - 1) +
                                    " of " + kernel_.name + " nobody can go on"};
  for (const auto& warp : block.warps) {
    std::string line = "warp " + std::to_string(warp.id);
    if (warp.done()) {
      line += " has ended";
    } else {
      const Instruction& in = *warp.waits_at;
      line += " waits in line " + std::to_string(in.line) + " (" + in.text.substr(0, 80) + ")";
      if (warp.state == Warp::kAtBarrier) {
        const auto there =
            std::count_if(block.warps.begin(), block.warps.end(), [&](const Warp& w) {
              return w.state == Warp::kAtBarrier && w.barrier == warp.barrier;
            });
        line += " at barrier " + std::to_string(warp.barrier) + ", where " + std::to_string(there) +
                " of " + std::to_string(warp.expected) + " warps are";
      } else {
        const Mbarrier& mbarrier = block.mbarriers.at(warp.barrier);
        line += " for the end of phase " + std::to_string(warp.parity) +
                " of the mbarrier at byte " + std::to_string(warp.barrier) + ", which lacks " +
                std::to_string(mbarrier.pending) + " arrivals and " +
                std::to_string(mbarrier.bytes) + " bytes";
      }
    }
    lines.push_back(line);
  }
  throw Fault(join_lines(lines));
}

}  // namespace emulator
