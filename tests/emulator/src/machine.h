// A launch: blocks of warps, run in turns that a seed decides.
#pragma once

#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "memory.h"

namespace emulator {

// A matrix in global memory that tensor copies read tiles of; rank 2.
struct TensorMap {
  u64 base;
  u64 sizes[2];  // the inner one first, as below
  u64 row_bytes;
  u32 box[2];
  u32 element_bytes;
  u32 swizzle_bytes;  // 0: none
  u32 magic;
  static constexpr u32 kMagic = 0x7a7a5a5a;
};

// A copy under way, from global to shared memory.
struct Copy {
  Who who;
  u64 from, to;
  int bytes, valid;  // what is not valid becomes zero
};

struct TensorCopy {
  Who who;
  const TensorMap* map;
  u64 to, mbarrier;
  i64 x, y;
  Clock at_issue;
};

// A product of a warp group under way.
struct GroupProduct {
  const Instruction* in;
  std::vector<u64> a;  // from registers, or empty
  u64 a_descriptor, b_descriptor;
  bool accumulates;
};

struct Mbarrier {
  bool valid = false;
  i64 count = 0, pending = 0, bytes = 0;
  int phase = 0;
  u8 agent = 0;
  u32 landed = 0;                // the agent's time
  Clock arriving{}, complete{};  // what those who arrived have seen
};

// Lanes that are at the same instruction.
struct Group {
  int at;
  u32 lanes;
};

struct Warp {
  int id = 0;
  std::vector<u64> registers;  // kLanes of each
  std::vector<u32> defined;    // lanes of each whose value does not hang on what nobody wrote
  std::vector<u8> computing;   // whether a product will write it
  std::vector<u64> changed;    // when it was written last, in instructions
  std::vector<Group> groups{{0, kAllLanes}};
  Clock now{};
  u64 executed = 0, fenced = 0;
  // Waiting: at barrier `barrier` for `expected` warps, or at an mbarrier.
  enum { kRuns, kAtBarrier, kAtMbarrier } state = kRuns;
  u64 barrier = 0;
  int expected = 0, parity = 0;
  const Instruction* waits_at = nullptr;
  u32 vote = 0;  // of a barrier with a reduction
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> copies;
  std::vector<GroupProduct> open_products;
  std::deque<std::vector<GroupProduct>> products;

  bool done() const { return groups.empty(); }
  u8 agent() const { return static_cast<u8>(id + 1); }
};

struct Block {
  u32 number;  // from 1
  std::vector<Warp> warps;
  SharedMemory shared;
  std::map<u64, Mbarrier> mbarriers;
  std::vector<TensorCopy> tensor_copies;
};

struct Launch {
  u32 grid[3];
  int threads;
  int dynamic_shared;
  std::vector<u8> parameters;  // as the kernel lays them out
};

class Machine {
 public:
  Machine(const Kernel& kernel, Launch launch, const std::map<u64, u64>& ranges, u64 seed,
          u64 most_instructions);
  // Throws Fault for what is wrong.
  void run();
  u64 executed() const { return executed_; }

 private:
  friend class Step;
  void run_blocks();
  std::unique_ptr<Block> make_block(u64 number);
  size_t next_group(Warp* warp) const;
  void turn(Block* block);
  bool step(Block* block, Warp* warp);
  bool release(Block* block);
  void land(Block* block, size_t which);
  void arrived(Mbarrier* mbarrier);
  [[noreturn]] void deadlock(const Block& block) const;

  const Kernel& kernel_;
  const Launch launch_;
  Findings findings_;
  GlobalMemory global_;
  std::mt19937_64 random_;
  bool eager_;  // whether tensor copies may land before somebody needs them
  u64 executed_ = 0;
  const u64 most_instructions_;
};

// One instruction of one warp.
class Step {
 public:
  Step(Machine* machine, Block* block, Warp* warp, const Instruction& in, u32 here, u32 active)
      : m_(*machine),
        block_(*block),
        warp_(*warp),
        in_(in),
        here_(here),
        active_(active),
        who_{&machine->kernel_, &in, &warp->now, warp->agent(), block->number} {}

  // Whether the warp goes on to the next instruction; else it waits at this one.
  bool execute();
  void finish_products(size_t kept);

 private:
  // Operands. Sources are rows of one number a lane.
  const u64* row(const Operand& operand, u64* scratch) const;
  u64 one(const Operand& operand, int lane) const;
  void put(const Operand& operand, int lane, u64 value);
  u64* result(const Operand& operand);
  u64 address(const Operand& operand, int lane) const;
  void need(const Operand& operand, const char* what) const;
  void whole_warp() const;
  void all_or_none() { defined_ = defined_ == kAllLanes ? kAllLanes : 0; }
  template <class Function>
  void lanes(Function function) const {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (active_ >> lane & 1) function(lane);
    }
  }
  [[noreturn]] void unknown() const;

  void arithmetic();
  template <class Function>
  void each(Function function);
  void select();
  void predicates();
  void integers();
  void floats();
  void halves();
  void doubles();
  void pairs();
  void compare();
  void convert();
  void move();

  void load();
  void store();
  void atomic();
  void matrices(bool loads);
  void shuffle();
  void reduce();
  void vote();
  void multiply();
  bool barrier();

  void copy();
  void wait_for_copies();
  void mbarrier();
  bool wait_for_mbarrier();
  void tensor_copy();
  void group_multiply();
  void compute(const GroupProduct& product);
  template <class Sum>
  void compute_as(const GroupProduct& product);
  bool transposed(const Instruction& in, bool first) const;
  template <class Visit>
  void tile_of(u64 descriptor, int rows, int depth, bool transposed, Visit visit) const;

  Machine& m_;
  Block& block_;
  Warp& warp_;
  const Instruction& in_;
  const u32 here_, active_;
  const Who who_;
  mutable u32 defined_ = kAllLanes;  // lanes whose sources, as far as they were read, are defined
};

}  // namespace emulator
