#include "memory.h"

#include <algorithm>
#include <memory>

namespace emulator {
namespace {

constexpr u8 kSeveralReaders = 0xff;

bool reached(u8 agent, u32 time, const Clock& now) { return agent == 0 || time <= now[agent]; }

std::string name_of(u8 agent) {
  return agent < kFirstMbarrier ? "warp " + std::to_string(agent - 1)
                                : "a copy to mbarrier " + std::to_string(agent - kFirstMbarrier);
}

std::string hex(u64 value) {
  char text[24];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

}  // namespace

std::string place(const Who& who) {
  std::string text = who.in->text.substr(0, 120);
  std::replace(text.begin(), text.end(), '\n', ' ');
  return name_of(who.agent) + " of block " + std::to_string(who.block - 1) + ", line " +
         std::to_string(who.in->line) + ": " + text;
}

void Findings::add(const Who& who, const std::string& what) {
  constexpr size_t kMost = 8;
  const std::string kind = what.substr(0, what.find(':'));
  if (found_.size() < kMost && seen_.insert({who.in, kind}).second) {
    found_.push_back(what + "; " + place(who));
  }
}

bool Readers::in_order(const Past& past, const Clock& now) const {
  if (past.reader != kSeveralReaders) return reached(past.reader, past.read_time, now);
  const Clock& set = sets_[past.read_time];
  for (int i = 0; i < kAgents; ++i) {
    if (set[i] > now[i]) return false;
  }
  return true;
}

void Readers::read(Past* past, u8 agent, const Clock& now) {
  if (past->reader == kSeveralReaders) {
    sets_[past->read_time][agent] = now[agent];
  } else if (past->reader == agent || reached(past->reader, past->read_time, now)) {
    past->reader = agent;
    past->read_time = now[agent];
  } else {
    if (free_.empty()) {
      free_.push_back(static_cast<u32>(sets_.size()));
      sets_.emplace_back();
    }
    Clock& set = sets_[free_.back()];
    set.fill(0);
    set[past->reader] = past->read_time;
    set[agent] = now[agent];
    past->reader = kSeveralReaders;
    past->read_time = free_.back();
    free_.pop_back();
  }
}

void Readers::written(Past* past, u8 agent, const Clock& now, bool atomic) {
  if (past->reader == kSeveralReaders) free_.push_back(past->read_time);
  *past = {now[agent], 0, agent, 0, atomic};
}

SharedMemory::SharedMemory(size_t bytes, Findings* findings)
    : bytes_(bytes, 0xcd),
      copying_(bytes),
      multiplying_(bytes),
      defined_(bytes),
      past_(bytes),
      findings_(findings) {}

bool SharedMemory::defined(u64 address, int bytes) const {
  return std::memchr(&defined_[address], 0, bytes) == nullptr;
}

void SharedMemory::define(u64 address, int bytes, bool defined) {
  std::memset(&defined_[address], defined, bytes);
}

void SharedMemory::within(const Who& who, u64 address, int bytes) const {
  if (address + bytes > bytes_.size()) {
    throw Fault("out of bounds: bytes " + std::to_string(address) + " to " +
                std::to_string(address + bytes) + " of " + std::to_string(bytes_.size()) +
                " of shared memory; " + place(who));
  }
  if (bytes <= 16 && address % bytes) {
    throw Fault("misaligned: byte " + std::to_string(address) + " of shared memory; " + place(who));
  }
}

void SharedMemory::conflict(const Who& who, const char* what, u64 address, u8 other) const {
  const std::string whose = other == kSeveralReaders ? "several warps" : name_of(other);
  findings_->add(who, std::string("race in shared memory: ") + what + " " + whose + ", at byte " +
                          std::to_string(address));
}

const u8* SharedMemory::read(const Who& who, u64 address, int bytes) {
  within(who, address, bytes);
  for (u64 at = address; at < address + bytes; ++at) {
    Past& past = past_[at];
    if (copying_[at])
      conflict(who, "reads what is being copied by", at, past.writer);
    else if (!reached(past.writer, past.write_time, *who.now))
      conflict(who, "reads what was just written by", at, past.writer);
    readers_.read(&past, who.agent, *who.now);
  }
  return &bytes_[address];
}

u8* SharedMemory::write(const Who& who, u64 address, int bytes, const u8* value, bool atomic) {
  within(who, address, bytes);
  for (u64 at = address; at < address + bytes; ++at) {
    Past& past = past_[at];
    // Equal bytes: whoever reads gets the same in any order.
    const bool same =
        value && !atomic && past.writer && !copying_[at] && value[at - address] == bytes_[at];
    if (copying_[at]) conflict(who, "writes what is being copied by", at, past.writer);
    if (multiplying_[at])
      conflict(who, "writes what is being multiplied by", at, past.reader);
    else if (!same && !readers_.in_order(past, *who.now))
      conflict(who, "writes what was just read by", at, past.reader);
    const bool unordered = !same && !(atomic && past.atomic);
    if (unordered && !reached(past.writer, past.write_time, *who.now))
      conflict(who, "writes what was just written by", at, past.writer);
    readers_.written(&past, who.agent, *who.now, atomic);
  }
  if (value) std::copy(value, value + bytes, &bytes_[address]);
  return &bytes_[address];
}

void SharedMemory::begin_copy(const Who& who, u64 address, int bytes) {
  write(who, address, bytes, nullptr);
  for (u64 at = address; at < address + bytes; ++at) copying_[at] = 1;
}

void SharedMemory::finish_copy(const Who& who, u64 address, int bytes, const u8* value) {
  for (u64 at = address; at < address + bytes; ++at) {
    copying_[at] = 0;
    readers_.written(&past_[at], who.agent, *who.now);
  }
  std::copy(value, value + bytes, &bytes_[address]);
  define(address, bytes, true);
}

void SharedMemory::begin_product(const Who& who, u64 address, int bytes) {
  read(who, address, bytes);
  for (u64 at = address; at < address + bytes; ++at) ++multiplying_[at];
}

void SharedMemory::finish_product(const Who& who, u64 address, int bytes) {
  for (u64 at = address; at < address + bytes; ++at) {
    --multiplying_[at];
    readers_.read(&past_[at], who.agent, *who.now);
  }
}

GlobalMemory::GlobalMemory(const std::map<u64, u64>& ranges, Findings* findings)
    : findings_(findings) {
  for (const auto& [begin, end] : ranges) {
    // calloc: what is never touched takes no memory.
    auto* cells = static_cast<Cell*>(std::calloc((end - begin) / 2 + 2, sizeof(Cell)));
    ranges_.push_back({begin, end, std::unique_ptr<Cell, Free>(cells)});
  }
}

GlobalMemory::Cell* GlobalMemory::cells(const Who& who, u64 address, int bytes) {
  if (address % bytes)
    throw Fault("misaligned: " + hex(address) + " in global memory; " + place(who));
  const auto holds = [&](const Range& range) {
    return range.begin <= address && address + bytes <= range.end;
  };
  if (last_ >= ranges_.size() || !holds(ranges_[last_])) {
    for (last_ = 0; last_ < ranges_.size() && !holds(ranges_[last_]);) ++last_;
  }
  if (last_ < ranges_.size())
    return ranges_[last_].cells.get() + (address - ranges_[last_].begin) / 2;
  std::string nearest = "no tensor";
  u64 least = ~u64{0};
  for (const Range& range : ranges_) {
    const bool before = address < range.begin;
    const u64 far = before ? range.begin - address : address + bytes - range.end;
    if (far >= least) continue;
    least = far;
    nearest = std::to_string(far) + (before ? " bytes before" : " bytes beyond") + " a tensor of " +
              std::to_string(range.end - range.begin);
  }
  throw Fault("out of bounds: " + hex(address) + ", " + nearest + "; " + place(who));
}

void GlobalMemory::conflict(const Who& who, const char* what, u64 address, u32 block,
                            u8 other) const {
  const std::string whose = block == kSeveral          ? "several blocks"
                            : block != who.block       ? "block " + std::to_string(block - 1)
                            : other == kSeveralReaders ? "several warps"
                                                       : name_of(other);
  findings_->add(
      who, std::string("race in global memory: ") + what + " " + whose + ", at " + hex(address));
}

const u8* GlobalMemory::read(const Who& who, u64 address, int bytes) {
  Cell* cell = cells(who, address, bytes);
  for (int at = 0; at < bytes; at += 2, ++cell) {
    Past& past = cell->past;
    const bool own = cell->write_block == who.block;
    if (past.writer && (!own || !reached(past.writer, past.write_time, *who.now))) {
      conflict(who, "reads what was written by", address + at, cell->write_block, past.writer);
    }
    if (cell->read_block == 0 || cell->read_block == who.block) {
      cell->read_block = who.block;
      readers_.read(&past, who.agent, *who.now);
    } else {
      cell->read_block = kSeveral;
    }
  }
  return reinterpret_cast<const u8*>(address);
}

u8* GlobalMemory::write(const Who& who, u64 address, int bytes, const u8* value, bool atomic) {
  Cell* cell = cells(who, address, bytes);
  u8* const memory = reinterpret_cast<u8*>(address);
  // Equal bytes: whoever reads gets the same in any order.
  const bool same = value && !atomic && std::equal(value, value + bytes, memory);
  for (int at = 0; at < bytes && !same; at += 2, ++cell) {
    Past& past = cell->past;
    const bool own = cell->write_block == who.block;
    if (past.writer && !(atomic && past.atomic) &&
        (!own || !reached(past.writer, past.write_time, *who.now))) {
      conflict(who, "writes what was written by", address + at, cell->write_block, past.writer);
    }
    if (cell->read_block && (cell->read_block != who.block || !readers_.in_order(past, *who.now))) {
      conflict(who, "writes what was read by", address + at, cell->read_block, past.reader);
    }
    readers_.written(&past, who.agent, *who.now, atomic);
    cell->write_block = who.block;
    cell->read_block = 0;
  }
  if (value) std::copy(value, value + bytes, memory);
  return memory;
}

}  // namespace emulator
