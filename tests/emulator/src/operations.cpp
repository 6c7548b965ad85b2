// Which operation an instruction's name stands for.
#include <map>
#include <set>

#include "text.h"

namespace emulator {
namespace {

// clang-format off
const std::map<std::string, Op>& operations() {
  static const std::map<std::string, Op> table = {
      {"add", Op::kAdd}, {"sub", Op::kSub}, {"mul", Op::kMul}, {"mad", Op::kMad}, {"fma", Op::kFma},
      {"div", Op::kDiv}, {"rem", Op::kRem}, {"min", Op::kMin}, {"max", Op::kMax}, {"neg", Op::kNeg},
      {"abs", Op::kAbs}, {"sqrt", Op::kSqrt}, {"rsqrt", Op::kRsqrt}, {"ex2", Op::kExp2},
      {"lg2", Op::kLog2}, {"rcp", Op::kReciprocal}, {"and", Op::kAnd}, {"or", Op::kOr},
      {"xor", Op::kXor}, {"not", Op::kNot}, {"shl", Op::kShiftLeft}, {"shr", Op::kShiftRight},
      {"bfe", Op::kBitField}, {"prmt", Op::kPermute}, {"popc", Op::kCountBits},
      {"selp", Op::kSelect}, {"setp", Op::kCompare},
      {"cvt", Op::kConvert}, {"mov", Op::kMove}, {"cvta", Op::kMove}, {"ld", Op::kLoad},
      {"st", Op::kStore}, {"atom", Op::kAtomic}, {"ldmatrix", Op::kLoadMatrix},
      {"stmatrix", Op::kStoreMatrix}, {"shfl", Op::kShuffle}, {"redux", Op::kReduce},
      {"vote", Op::kVote}, {"elect", Op::kElect}, {"bar", Op::kBarrier}, {"barrier", Op::kBarrier},
      {"mma", Op::kMultiply}, {"bra", Op::kBranch}, {"brx", Op::kBranchIndexed},
      {"ret", Op::kReturn}, {"exit", Op::kReturn},
      // A compiler's hints, and orders that are always kept here (see docs/gpu.md).
      {"fence", Op::kNothing}, {"membar", Op::kNothing}, {"setmaxnreg", Op::kNothing},
      {"griddepcontrol", Op::kNothing}};
  return table;
}
// clang-format on

// Of arithmetic: what is not known may change the result.
bool known_modifier(const Instruction& in, const std::string& word) {
  static const std::set<std::string> known = {
      "lo",  "hi",  "wide",   "rn",   "rz",  "rm", "rp",    "rni",    "rzi",    "rmi",
      "rpi", "ftz", "approx", "full", "NaN", "to", "param", "global", "shared", "shared-cta"};
  if (word == "relu") return (in.op == Op::kMin || in.op == Op::kMax) && !in.type.is_float();
  return known.count(word) != 0;
}

}  // namespace

void choose_operation(Instruction* in) {
  const auto& words = in->words;
  const auto found = operations().find(words[0]);
  const std::string second = words.size() > 1 ? words[1] : "";
  if (found != operations().end()) {
    in->op = found->second;
  } else if (words[0] == "cp" && in->has("bulk")) {
    if (!in->has("tensor") || !in->has("2d") || !in->has("shared-cluster"))
      throw Fault("unknown instruction");
    in->op = Op::kTensorCopy;
  } else if (words[0] == "cp" && second == "async") {
    in->op = in->has("commit_group")                        ? Op::kCopyCommit
             : in->has("wait_group") || in->has("wait_all") ? Op::kCopyWait
                                                            : Op::kCopy;
    if (in->has("mbarrier") || in->has("wait_all")) throw Fault("unknown instruction");
  } else if (words[0] == "mbarrier") {
    static const std::map<std::string, Op> own = {{"init", Op::kMbarrierInit},
                                                  {"inval", Op::kMbarrierInvalidate},
                                                  {"arrive", Op::kMbarrierArrive},
                                                  {"try_wait", Op::kMbarrierWait}};
    if (!own.count(second)) throw Fault("unknown instruction");
    in->op = in->has("expect_tx") ? Op::kMbarrierExpect : own.at(second);
  } else if (words[0] == "wgmma") {
    static const std::map<std::string, Op> own = {{"fence", Op::kGroupFence},
                                                  {"mma_async", Op::kGroupMultiply},
                                                  {"commit_group", Op::kGroupCommit},
                                                  {"wait_group", Op::kGroupWait}};
    if (!own.count(second)) throw Fault("unknown instruction");
    in->op = own.at(second);
  } else {
    throw Fault("unknown instruction");
  }
  if (in->op <= Op::kMove && in->op != Op::kCompare) {
    for (size_t i = 1; i < words.size(); ++i) {
      Type type;
      if (!parse_type(words[i], &type) && !known_modifier(*in, words[i]))
        throw Fault("unknown instruction");
    }
  }
  if (in->op == Op::kMul)
    in->op = in->has("wide") ? Op::kMulWide : in->has("hi") ? Op::kMulHigh : Op::kMul;
  if (in->op == Op::kMad && in->has("wide")) in->op = Op::kMadWide;
  if (in->op == Op::kMad && in->has("hi")) throw Fault("unknown instruction");
  if (in->op == Op::kMad && in->type.is_float()) in->op = Op::kFma;
  if (in->op == Op::kBarrier) {
    if (second == "warp")
      in->op = Op::kWarpBarrier;
    else if (second == "red")
      in->op = Op::kBarrierReduce;
    else if (second != "sync")
      throw Fault("unknown instruction");
  }
  if (in->op == Op::kCompare) in->compare = second;
  if (in->op == Op::kShuffle || in->op == Op::kReduce || in->op == Op::kVote)
    in->compare = words[2];
  if (in->op == Op::kLoad || in->op == Op::kStore || in->op == Op::kAtomic) {
    const bool is_shared = in->has("shared") || in->has("shared-cta");
    in->space = is_shared ? Space::kShared : in->has("param") ? Space::kParameter : Space::kGlobal;
    if (in->space == Space::kGlobal && !in->has("global")) throw Fault("unknown instruction");
  }
  if (in->op == Op::kMbarrierWait && !in->has("parity")) throw Fault("unknown instruction");
  static const std::set<Op> kTogether = {
      Op::kBarrier,      Op::kBarrierReduce, Op::kWarpBarrier,   Op::kShuffle,     Op::kReduce,
      Op::kVote,         Op::kElect,         Op::kMultiply,      Op::kLoadMatrix,  Op::kStoreMatrix,
      Op::kMbarrierWait, Op::kGroupFence,    Op::kGroupMultiply, Op::kGroupCommit, Op::kGroupWait};
  in->together = kTogether.count(in->op) != 0;
}

}  // namespace emulator
