// Shared and global memory that know who touched each byte last, and whether that was in order.
//
// Order is what barriers make of it, kept in vector clocks: an access is in order with an earlier
// one if the earlier one's time has reached the accessing agent. Agents are a block's warps and, as
// tensor copies land at any time, each of its mbarriers.
#pragma once

#include <array>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <set>

#include "program.h"

namespace emulator {

constexpr int kAgents = 64;  // 1 to 32: warps; above: mbarriers; 0 is nobody
constexpr int kFirstMbarrier = 33;
using Clock = std::array<u32, kAgents>;

inline void join(Clock* clock, const Clock& other) {
  for (int i = 0; i < kAgents; ++i) (*clock)[i] = std::max((*clock)[i], other[i]);
}

// Who accesses memory, for the clocks and for messages.
struct Who {
  const Kernel* kernel;
  const Instruction* in;
  const Clock* now;
  u8 agent;
  u32 block;  // from 1
};

// What a launch did wrong without ending it; each kind of line once.
class Findings {
 public:
  void add(const Who& who, const std::string& what);
  const std::vector<std::string>& all() const { return found_; }

 private:
  std::set<std::pair<const Instruction*, std::string>> seen_;
  std::vector<std::string> found_;
};

std::string place(const Who& who);

// The latest write and the reads since then of some bytes; all zero is untouched.
struct Past {
  u32 write_time, read_time;  // read_time: the number of a set where several read
  u8 writer, reader;
  bool atomic;  // whether the write was
};

// Sets of readers that no order among them makes one of.
class Readers {
 public:
  bool in_order(const Past& past, const Clock& now) const;
  void read(Past* past, u8 agent, const Clock& now);
  void written(Past* past, u8 agent, const Clock& now, bool atomic = false);

 private:
  std::vector<Clock> sets_;
  std::vector<u32> free_;
};

class SharedMemory {
 public:
  SharedMemory(size_t bytes, Findings* findings);

  // Where an access of so many bytes is, after checking it.
  const u8* read(const Who& who, u64 address, int bytes);
  u8* write(const Who& who, u64 address, int bytes, const u8* value, bool atomic = false);
  // A copy or a product that will touch the bytes until it is finished.
  void begin_copy(const Who& who, u64 address, int bytes);
  void finish_copy(const Who& who, u64 address, int bytes, const u8* value);
  void begin_product(const Who& who, u64 address, int bytes);
  void finish_product(const Who& who, u64 address, int bytes);
  const u8* at(u64 address) const { return &bytes_[address]; }
  // Whether the bytes hold something that hangs on nothing but what was written.
  bool defined(u64 address, int bytes) const;
  void define(u64 address, int bytes, bool defined);

 private:
  void within(const Who& who, u64 address, int bytes) const;
  void conflict(const Who& who, const char* what, u64 address, u8 other) const;

  std::vector<u8> bytes_, copying_, multiplying_, defined_;
  std::vector<Past> past_;
  Readers readers_;
  Findings* findings_;
};

// The tensors of a launch; nothing else may be accessed.
class GlobalMemory {
 public:
  GlobalMemory(const std::map<u64, u64>& ranges, Findings* findings);

  const u8* read(const Who& who, u64 address, int bytes);
  u8* write(const Who& who, u64 address, int bytes, const u8* value, bool atomic = false);

 private:
  struct Cell {  // of two bytes
    Past past;
    u32 write_block, read_block;  // kSeveral: read by several
  };
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  struct Range {
    u64 begin, end;
    std::unique_ptr<Cell, Free> cells;
  };
  static constexpr u32 kSeveral = 0xffffffffu;

  Cell* cells(const Who& who, u64 address, int bytes);
  void conflict(const Who& who, const char* what, u64 address, u32 other_block, u8 other) const;

  std::vector<Range> ranges_;
  size_t last_ = 0;
  Readers readers_;
  Findings* findings_;
};

}  // namespace emulator
