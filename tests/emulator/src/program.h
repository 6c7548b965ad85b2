// PTX as the machine runs it: instructions with resolved registers, labels and symbols.
#pragma once

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "values.h"

namespace emulator {

constexpr int kLanes = 32;
constexpr u32 kAllLanes = 0xffffffffu;

// What ends a launch: a kernel that is wrong, or something that the emulator does not know.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Type {
  char kind = 'b';  // b bits, u unsigned, s signed, f float, B bfloat, p predicate
  int bits = 32;
  bool pair = false;  // two 16-bit numbers

  bool is_float() const { return kind == 'f' || kind == 'B'; }
};

enum class Space { kGlobal, kShared, kParameter };

// clang-format off
enum class Op {
  // Arithmetic, lane by lane.
  kAdd, kSub, kMul, kMulHigh, kMulWide, kMad, kMadWide, kFma, kDiv, kRem, kMin, kMax, kNeg, kAbs,
  kSqrt, kRsqrt, kExp2, kLog2, kReciprocal, kAnd, kOr, kXor, kNot, kShiftLeft, kShiftRight,
  kBitField, kPermute, kCountBits, kSelect, kCompare, kConvert, kMove,
  // Memory.
  kLoad, kStore, kAtomic, kLoadMatrix, kStoreMatrix,
  // Between lanes and warps.
  kShuffle, kReduce, kVote, kElect, kBarrier, kBarrierReduce, kWarpBarrier, kMultiply,
  // Asynchronous.
  kCopy, kCopyCommit, kCopyWait, kMbarrierInit, kMbarrierInvalidate, kMbarrierArrive,
  kMbarrierExpect, kMbarrierWait, kTensorCopy,
  kGroupFence, kGroupMultiply, kGroupCommit, kGroupWait,
  // Control.
  kBranch, kBranchIndexed, kReturn, kNothing,
};
// clang-format on

struct Operand {
  enum Kind { kNone, kRegister, kConstant, kParameter, kMemory, kVector, kSink } kind = kNone;
  int index = -1;  // of the register, constant or parameter
  bool negated = false;
  i64 offset = 0;              // kMemory: bytes beyond the first part's value
  std::vector<Operand> parts;  // kMemory: address, then coordinates; kVector: the elements
};

struct Instruction {
  Op op = Op::kNothing;
  Type type, from;  // the result's and the source's, where two are named
  Space space = Space::kGlobal;
  std::vector<std::string> words;  // its name without the dots
  int vector = 1;
  Operand to, second;            // results
  std::vector<Operand> sources;  // sources
  int predicate = -1;
  bool predicate_negated = false;
  std::vector<int> targets;
  std::string compare;    // comparison, shuffle or reduction
  bool flush = false;     // .ftz
  bool together = false;  // whether all lanes of a warp do it at once
  std::string text;
  int line = 0;

  bool has(const char* word) const {
    for (const auto& each : words) {
      if (each == word) return true;
    }
    return false;
  }
};

struct Parameter {
  int offset, size;
};

// Registers 0 to kSpecials - 1 hold what PTX names %tid.x and so on.
enum Special {
  kTid,
  kThreads,
  kCta,
  kCtaY,
  kCtaZ,
  kGrid,
  kGridY,
  kGridZ,
  kLane,
  kWarp,
  kZero,
  kSpecials
};

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  std::vector<Parameter> parameters;
  int parameter_bytes = 0;
  int threads = 0;  // of a block; 0: any
  int registers = kSpecials;
  int static_shared = 0;  // bytes before the dynamic ones
  std::vector<std::string> register_names;
  std::vector<u64> constants;  // each kLanes times: read like a register
};

// All kernels of a module; throws Fault at what it does not know.
std::vector<Kernel> load(const std::string& ptx);

}  // namespace emulator
