// Arithmetic lane by lane.
#include <algorithm>

#include "each.h"

namespace emulator {
namespace {

float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// Of two numbers one of which may be NaN; -0 is below +0.
template <class T>
T least(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  return a == b ? (std::signbit(a) ? a : b) : std::min(a, b);
}

template <class T>
T most(T a, T b) {
  return -least(-a, -b);
}

// A relation and whether NaN satisfies it ("ltu"); equality of integers has no other names.
struct Relation {
  explicit Relation(const std::string& name, bool floats) : relation(name) {
    if (floats && name.size() == 3 && name[2] == 'u') {
      relation.pop_back();
      unordered = true;
    } else if (name == "lo" || name == "ls" || name == "hi" || name == "hs") {
      relation = name == "lo" ? "lt" : name == "ls" ? "le" : name == "hi" ? "gt" : "ge";
    }
  }

  template <class T>
  bool between(T a, T b) const {
    const char first = relation[0], last = relation[1];
    if (first == 'e') return a == b;
    if (relation == "ne") return !(a == b);
    return first == 'l' ? (last == 'e' ? a <= b : a < b) : (last == 'e' ? a >= b : a > b);
  }

  bool between_floats(double a, double b) const {
    const bool nan = a != a || b != b;
    if (relation == "num") return !nan;
    if (relation == "nan") return nan;
    return nan ? unordered : between(a, b);
  }

  std::string relation;
  bool unordered = false;
};

double number(u64 value, const Type& type) {
  if (type.bits == 64) return f64(value);
  if (type.bits == 32) return f32(value);
  return type.kind == 'B' ? from_bf16(value) : from_f16(value);
}

u64 encoded(double value, const Type& type) {
  if (type.bits == 64) return of(value);
  const auto narrow = static_cast<float>(value);
  return type.bits == 32 ? of(narrow) : type.kind == 'B' ? to_bf16(narrow) : to_f16(narrow);
}

u64 to_integer(double value, const Type& type) {
  if (value != value) return 0;
  const int bits = type.bits;
  const double high = std::ldexp(1.0, type.kind == 's' ? bits - 1 : bits);
  const double low = type.kind == 's' ? -high : 0;
  if (value >= high) return cut(~u64{0}, type.kind == 's' ? bits - 1 : bits);
  const double kept = std::max(value, low);
  return cut(kept < 0 ? static_cast<u64>(static_cast<i64>(kept)) : static_cast<u64>(kept), bits);
}

}  // namespace

void Step::arithmetic() {
  if (in_.op == Op::kSelect) {
    select();
  } else if (in_.type.kind == 'p') {
    predicates();
  } else if (in_.type.pair) {
    pairs();
  } else if (in_.type.is_float()) {
    if (in_.type.bits == 32)
      floats();
    else if (in_.type.bits == 64)
      doubles();
    else
      halves();
  } else {
    integers();
  }
}

void Step::select() {
  u64 scratch[3][kLanes];
  const u64* const p = row(in_.sources[2], scratch[2]);
  const u32 chosen = defined_;
  const u64* const a = row(in_.sources[0], scratch[0]);
  const u32 first = defined_;
  defined_ = chosen;
  const u64* const b = row(in_.sources[1], scratch[1]);
  const u32 second = defined_;
  u32 ones = 0;
  for (int lane = 0; lane < kLanes; ++lane) ones |= static_cast<u32>(p[lane] & 1) << lane;
  defined_ = (first & ones) | (second & ~ones);
  u64* const to = result(in_.to);
  lanes([&](int lane) { to[lane] = p[lane] & 1 ? a[lane] : b[lane]; });
}

// A false operand decides "and", a true one "or", whatever the other is.
void Step::predicates() {
  if (in_.op != Op::kAnd && in_.op != Op::kOr) return integers();
  const bool decides = in_.op == Op::kOr;
  u64 scratch[2][kLanes];
  u32 defined[2], deciding[2] = {};
  const u64* sources[2];
  for (int i = 0; i < 2; ++i) {
    defined_ = kAllLanes;
    sources[i] = row(in_.sources[i], scratch[i]);
    defined[i] = defined_;
    for (int lane = 0; lane < kLanes; ++lane) {
      deciding[i] |= static_cast<u32>((sources[i][lane] & 1) == decides) << lane;
    }
  }
  defined_ = (defined[0] & defined[1]) | (defined[0] & deciding[0]) | (defined[1] & deciding[1]);
  u64* const to = result(in_.to);
  lanes([&](int lane) {
    to[lane] =
        (decides ? sources[0][lane] | sources[1][lane] : sources[0][lane] & sources[1][lane]) & 1;
  });
}

void Step::floats() {
  const bool flush = in_.flush;
  const auto with = [&](auto function) {
    if (flush) {
      each([&](u64 a, u64 b, u64 c) {
        return of(flushed(function(flushed(f32(a)), flushed(f32(b)), flushed(f32(c)))));
      });
    } else {
      each([&](u64 a, u64 b, u64 c) { return of(function(f32(a), f32(b), f32(c))); });
    }
  };
  const bool nan = in_.op == Op::kMin || in_.op == Op::kMax ? in_.has("NaN") : false;
  const auto or_nan = [nan](float a, float b, float found) {
    return nan && (a != a || b != b) ? f32(0x7fffffff) : found;
  };
  // clang-format off
  switch (in_.op) {
    case Op::kAdd: return with([](float a, float b, float) { return a + b; });
    case Op::kSub: return with([](float a, float b, float) { return a - b; });
    case Op::kMul: return with([](float a, float b, float) { return a * b; });
    case Op::kFma: return with([](float a, float b, float c) { return std::fma(a, b, c); });
    case Op::kDiv: return with([](float a, float b, float) { return a / b; });
    case Op::kMin: return with([=](float a, float b, float) { return or_nan(a, b, least(a, b)); });
    case Op::kMax: return with([=](float a, float b, float) { return or_nan(a, b, most(a, b)); });
    case Op::kNeg: return each([](u64 a, u64, u64) { return cut(a, 32) ^ 0x80000000u; });
    case Op::kAbs: return each([](u64 a, u64, u64) { return a & 0x7fffffffu; });
    case Op::kSqrt: return with([](float a, float, float) { return std::sqrt(a); });
    case Op::kRsqrt: return with([](float a, float, float) { return 1 / std::sqrt(a); });
    case Op::kExp2: return with([](float a, float, float) { return std::exp2(a); });
    case Op::kLog2: return with([](float a, float, float) { return std::log2(a); });
    case Op::kReciprocal: return with([](float a, float, float) { return 1 / a; });
    default: unknown();
  }
  // clang-format on
}

// One 16-bit float a register: what compilers leave of comparisons in fp32.
void Step::halves() {
  const Type half = in_.type;
  const auto value = [half](u64 a) { return static_cast<float>(number(a, half)); };
  if (in_.has("ftz") || in_.has("NaN") || in_.has("xorsign")) unknown();
  if (in_.op == Op::kAbs) return each([](u64 a, u64, u64) { return a & 0x7fff; });
  if (in_.op == Op::kMax)
    return each([=](u64 a, u64 b, u64) { return encoded(most(value(a), value(b)), half); });
  unknown();
}

void Step::doubles() {
  const auto with = [&](auto function) {
    each([&](u64 a, u64 b, u64 c) { return of(function(f64(a), f64(b), f64(c))); });
  };
  // clang-format off
  switch (in_.op) {
    case Op::kAdd: return with([](double a, double b, double) { return a + b; });
    case Op::kSub: return with([](double a, double b, double) { return a - b; });
    case Op::kMul: return with([](double a, double b, double) { return a * b; });
    case Op::kFma: return with([](double a, double b, double c) { return std::fma(a, b, c); });
    case Op::kDiv: return with([](double a, double b, double) { return a / b; });
    case Op::kMin: return with([](double a, double b, double) { return least(a, b); });
    case Op::kMax: return with([](double a, double b, double) { return most(a, b); });
    case Op::kNeg: return with([](double a, double, double) { return -a; });
    case Op::kAbs: return with([](double a, double, double) { return std::fabs(a); });
    case Op::kSqrt: return with([](double a, double, double) { return std::sqrt(a); });
    case Op::kReciprocal: return with([](double a, double, double) { return 1 / a; });
    default: unknown();
  }
  // clang-format on
}

// Two 16-bit floats a register.
void Step::pairs() {
  const Type half{in_.type.kind, 16, false};
  const auto with = [&](auto function) {
    each([&](u64 a, u64 b, u64 c) {
      u64 both = 0;
      for (const int at : {0, 16}) {
        const auto part = [&](u64 x) { return static_cast<float>(number(x >> at & 0xffff, half)); };
        both |= encoded(function(part(a), part(b), part(c)), half) << at;
      }
      return both;
    });
  };
  // clang-format off
  switch (in_.op) {
    case Op::kAdd: return with([](float a, float b, float) { return a + b; });
    case Op::kSub: return with([](float a, float b, float) { return a - b; });
    case Op::kMul: return with([](float a, float b, float) { return a * b; });
    case Op::kFma: return with([](float a, float b, float c) { return std::fma(a, b, c); });
    default: unknown();
  }
  // clang-format on
}

void Step::compare() {
  const Type& type = in_.type;
  const Relation relation(in_.compare, type.is_float());
  static const char* const kKnown[] = {"eq", "ne", "lt", "le", "gt", "ge", "num", "nan"};
  if (std::find(std::begin(kKnown), std::end(kKnown), relation.relation) == std::end(kKnown))
    unknown();
  const std::string combined = in_.sources.size() > 2 ? in_.words[2] : "";
  u64 scratch[3][kLanes];
  const u64* a = row(in_.sources[0], scratch[0]);
  const u64* b = row(in_.sources[1], scratch[1]);
  const u64* p = combined.empty() ? a : row(in_.sources[2], scratch[2]);
  u64 other[kLanes] = {};
  u64* const to = result(in_.to);
  lanes([&](int lane) {
    bool holds;
    if (type.pair) {
      const Type half{type.kind, 16, false};
      holds =
          relation.between_floats(number(a[lane] & 0xffff, half), number(b[lane] & 0xffff, half));
      other[lane] = relation.between_floats(number(a[lane] >> 16 & 0xffff, half),
                                            number(b[lane] >> 16 & 0xffff, half));
    } else {
      const u64 x = a[lane], y = b[lane];
      holds = type.is_float()    ? relation.between_floats(number(x, type), number(y, type))
              : type.kind == 's' ? relation.between(extend(x, type.bits), extend(y, type.bits))
                                 : relation.between(cut(x, type.bits), cut(y, type.bits));
      const bool q = p[lane] & 1;
      if (combined == "and")
        holds = holds && q;
      else if (combined == "or")
        holds = holds || q;
      else if (combined == "xor")
        holds = holds != q;
      else if (!combined.empty())
        unknown();
      other[lane] = !holds;
    }
    to[lane] = holds;
  });
  if (in_.second.kind == Operand::kNone) return;
  lanes([&](int lane) { put(in_.second, lane, other[lane]); });
}

void Step::convert() {
  const Type to = in_.type, from = in_.from;
  if (to.pair) {  // two numbers into one register, the first above
    const Type half{to.kind, 16, false};
    if (from.is_float() && from.bits == 32 && in_.has("rn")) {
      return each(
          [&](u64 a, u64 b, u64) { return encoded(f32(a), half) << 16 | encoded(f32(b), half); });
    }
    unknown();
  }
  if (from.is_float()) {
    const char* const rounding = in_.has("rni")   ? "rni"
                                 : in_.has("rmi") ? "rmi"
                                 : in_.has("rpi") ? "rpi"
                                 : in_.has("rzi") ? "rzi"
                                                  : "";
    if (!*rounding && (!to.is_float() || in_.has("rz") || in_.has("rm") || in_.has("rp")))
      unknown();
    return each([&](u64 a, u64, u64) {
      double value = number(a, from);
      if (in_.flush) value = flushed(static_cast<float>(value));
      if (rounding[0]) {
        value = rounding[1] == 'n'   ? std::nearbyint(value)
                : rounding[1] == 'm' ? std::floor(value)
                : rounding[1] == 'p' ? std::ceil(value)
                                     : std::trunc(value);
      }
      return to.is_float() ? encoded(value, to) : to_integer(value, to);
    });
  }
  if (to.is_float()) {
    if (!in_.has("rn")) unknown();
    return each([&](u64 a, u64, u64) {
      // Straight from the integer: by way of a double it would be rounded twice.
      if (from.kind == 's') {
        const i64 value = extend(a, from.bits);
        return to.bits == 64 ? of(static_cast<double>(value))
                             : encoded(static_cast<float>(value), to);
      }
      const u64 value = cut(a, from.bits);
      return to.bits == 64 ? of(static_cast<double>(value))
                           : encoded(static_cast<float>(value), to);
    });
  }
  each([&](u64 a, u64, u64) {
    return cut(from.kind == 's' ? static_cast<u64>(extend(a, from.bits)) : cut(a, from.bits),
               to.bits);
  });
}

// Copies, joins the parts of a register and takes them apart.
void Step::move() {
  const Operand &to = in_.to, &from = in_.sources[0];
  const int bits = in_.type.bits;
  if (to.kind == Operand::kVector) {
    u64 scratch[kLanes];
    const u64* const source = row(from, scratch);
    u64 whole[kLanes];
    std::copy_n(source, kLanes, whole);
    const int part = bits / static_cast<int>(to.parts.size());
    for (size_t i = 0; i < to.parts.size(); ++i) {
      lanes([&](int lane) { put(to.parts[i], lane, cut(whole[lane] >> (part * i), part)); });
    }
  } else if (from.kind == Operand::kVector) {
    const int part = bits / static_cast<int>(from.parts.size());
    lanes([&](int lane) {
      u64 whole = 0;
      for (size_t i = 0; i < from.parts.size(); ++i)
        whole |= cut(one(from.parts[i], lane), part) << (part * i);
      put(to, lane, whole);
    });
  } else {
    each([&](u64 a, u64, u64) { return cut(a, bits); });
  }
}

}  // namespace emulator
