// Reads PTX: one pass over the statements of each entry, labels last.
#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <unordered_map>
#include <utility>

#include "text.h"

namespace emulator {
namespace {

const std::map<std::string, int>& specials() {
  static const std::map<std::string, int> table = {
      {"%tid.x", kTid},       {"%tid.y", kZero},          {"%tid.z", kZero},
      {"%ntid.x", kThreads},  {"%ctaid.x", kCta},         {"%ctaid.y", kCtaY},
      {"%ctaid.z", kCtaZ},    {"%nctaid.x", kGrid},       {"%nctaid.y", kGridY},
      {"%nctaid.z", kGridZ},  {"%laneid", kLane},         {"%warpid", kWarp},
      {"%clusterid.x", kCta}, {"%cluster_ctarank", kZero}};
  return table;
}

class Loader {
 public:
  Kernel kernel;

  // `text` begins behind ".entry"; `module` is all before it, which may declare shared memory.
  Loader(const std::string& module, const std::string& text, int line) : line_(line) {
    scopes_.push_back({0, {specials().begin(), specials().end()}});
    const size_t open = text.find('('), close = text.find(')', open), body = text.find('{', close);
    kernel.name = trim(text.substr(0, open));
    parameters(text.substr(open + 1, close - open - 1));
    directives(text.substr(close, body - close));
    shared(module, false);
    shared(text, true);
    line_ += static_cast<int>(std::count(text.begin(), text.begin() + body, '\n'));
    statements(text, body + 1);
    resolve();
  }

 private:
  using Scoped = std::pair<std::string, int>;  // a label and the scope it was declared in
  struct Scope {
    int id;
    std::unordered_map<std::string, int> registers;
  };

  void parameters(const std::string& list) {
    for (const auto& declaration : split(list, ',')) {
      int size = 0, align = 0;
      std::string name = declaration.substr(declaration.find_last_of(" \t") + 1);
      const size_t array = name.find('[');
      if (array != std::string::npos) {
        size = std::atoi(name.c_str() + array + 1);
        align = std::atoi(declaration.c_str() + declaration.find(".align") + 6);
        name.resize(array);
      } else {
        size = align = type_of(declaration).bits / 8;
      }
      int& bytes = kernel.parameter_bytes;
      bytes = (bytes + align - 1) / align * align;
      parameter_numbers_[name] = static_cast<int>(kernel.parameters.size());
      kernel.parameters.push_back({bytes, size});
      bytes += size;
    }
  }

  void directives(const std::string& text) {
    const size_t at = text.find(".reqntid");
    if (at != std::string::npos) kernel.threads = std::atoi(text.c_str() + at + 8);
  }

  // Places of shared variables: the static ones one after the other, then the dynamic ones.
  void shared(const std::string& text, bool in_body) {
    for (size_t at = text.find(".shared "); at != std::string::npos;
         at = text.find(".shared ", at + 1)) {
      const size_t start = text.rfind('\n', at) + 1;
      const bool dynamic = text.compare(start, 7, ".extern") == 0;
      // An instruction's name goes on before it, and what was demoted is a comment.
      if (!dynamic && trim(text.substr(start, at - start)) != "") continue;
      const std::string declaration = text.substr(at, text.find(';', at) - at);
      std::string name = declaration.substr(declaration.find_last_of(" \t") + 1);
      const size_t align_at = declaration.find(".align");
      const int align =
          align_at == std::string::npos ? 4 : std::atoi(declaration.c_str() + align_at + 6);
      int size = type_of(declaration).bits / 8;
      if (const size_t array = name.find('['); array != std::string::npos) {
        size *= std::atoi(name.c_str() + array + 1);
        name.resize(array);
      }
      if (dynamic) {
        dynamic_ = name;
        continue;
      }
      if (!in_body) throw Fault("shared memory of a whole module: " + declaration);
      kernel.static_shared = (kernel.static_shared + align - 1) / align * align;
      symbols_[name] = kernel.static_shared;
      kernel.static_shared += size;
    }
    kernel.static_shared = (kernel.static_shared + 15) / 16 * 16;
    if (!dynamic_.empty()) symbols_[dynamic_] = kernel.static_shared;
  }

  void statements(const std::string& text, size_t at) {
    std::string statement;
    const auto blank = [&] { return trim(statement).empty(); };
    const auto to_line_end = [&] { at = std::min(text.find('\n', at), text.size()); };
    for (int depth = 1; at < text.size(); ++at) {
      const char c = text[at];
      if (c == '\n') ++line_;
      if (text.compare(at, 2, "//") == 0 || (blank() && text.compare(at, 4, ".loc") == 0)) {
        to_line_end();
        ++line_;
      } else if (blank() && c == '{') {
        scopes_.push_back({++n_scopes_, {}});
        ++depth;
      } else if (blank() && c == '}') {
        if (--depth == 0) return;
        scopes_.pop_back();
      } else if (c == ':' && text[at + 1] != ':' && text[at - 1] != ':' &&
                 is_label(trim(statement))) {
        const Scoped label = scoped_label(trim(statement));
        statement.clear();
        const size_t next = text.find_first_not_of(" \t\r\n", at + 1);
        if (text.compare(next, 14, ".branchtargets") == 0) {
          const size_t end = text.find(';', next);
          branch_targets_[label.first] = text.substr(next + 14, end - next - 14);
          line_ += static_cast<int>(std::count(text.begin() + at, text.begin() + end, '\n'));
          at = end;
        } else {
          labels_[label] = static_cast<int>(kernel.code.size());
        }
      } else if (c == ';') {
        if (!blank()) take(trim(statement));
        statement.clear();
      } else {
        statement += c;
      }
    }
    throw Fault("the kernel " + kernel.name + " has no end");
  }

  static bool is_label(const std::string& text) {
    const auto part = [](char c) {
      return std::isalnum(static_cast<u8>(c)) || c == '_' || c == '$';
    };
    return !text.empty() && std::all_of(text.begin(), text.end(), part);
  }

  // Labels of inline PTX belong to its braces, those of the compiler to the kernel.
  Scoped scoped_label(const std::string& name) const {
    return {name, name[0] == '$' ? 0 : scopes_.back().id};
  }

  void take(const std::string& statement) {
    if (statement.rfind(".reg", 0) == 0) return declare(statement);
    if (statement[0] == '.') {
      if (statement.rfind(".shared", 0) == 0 || statement.rfind(".pragma", 0) == 0) return;
      throw Fault("unknown directive, line " + std::to_string(line_) + ": " + statement);
    }
    Instruction in;
    in.text = statement;
    in.line = line_;
    try {
      parse(statement, &in);
    } catch (const Fault& fault) {
      throw Fault(std::string(fault.what()) + ", line " + std::to_string(line_) + ": " + statement);
    }
    kernel.code.push_back(in);
  }

  // `.reg .b32 %r<18>` or `.reg .pred passes, fits`
  void declare(const std::string& statement) {
    const size_t type = statement.find('.', 4), names = statement.find_first_of(" \t", type);
    for (const auto& name : split(statement.substr(names), ',')) {
      const size_t range = name.find('<');
      const int count = range == std::string::npos ? 1 : std::atoi(name.c_str() + range + 1);
      for (int i = 0; i < count; ++i) {
        const std::string own =
            range == std::string::npos ? name : name.substr(0, range) + std::to_string(i);
        scopes_.back().registers[own] = kernel.registers++;
      }
    }
  }

  int find_register(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->registers.find(name);
      if (found != scope->registers.end()) return found->second;
    }
    throw Fault("unknown name " + name);
  }

  static u64 number(std::string text) {
    if (text.size() == 10 && (text.rfind("0f", 0) == 0 || text.rfind("0F", 0) == 0)) {
      return std::strtoull(text.c_str() + 2, nullptr, 16);
    }
    if (text.size() == 18 && (text.rfind("0d", 0) == 0 || text.rfind("0D", 0) == 0)) {
      return std::strtoull(text.c_str() + 2, nullptr, 16);
    }
    char* end = nullptr;
    const u64 value = text[0] == '-' ? static_cast<u64>(std::strtoll(text.c_str(), &end, 0))
                                     : std::strtoull(text.c_str(), &end, 0);
    if (*end != 0 && *end != 'U') throw Fault("no number: " + text);
    return value;
  }

  Operand constant(u64 value) {
    Operand operand;
    operand.kind = Operand::kConstant;
    const auto found = std::find(constant_values_.begin(), constant_values_.end(), value);
    operand.index = static_cast<int>(found - constant_values_.begin());
    if (found == constant_values_.end()) {
      constant_values_.push_back(value);
      kernel.constants.insert(kernel.constants.end(), kLanes, value);
    }
    return operand;
  }

  Operand operand(const std::string& text) {
    Operand made;
    if (text[0] == '{') {
      made.kind = Operand::kVector;
      for (const auto& part : split(text.substr(1, text.size() - 2), ',')) {
        made.parts.push_back(operand(part));
      }
      return made.parts.size() == 1 ? Operand(made.parts[0]) : made;
    }
    if (text[0] == '[') {
      made.kind = Operand::kMemory;
      const auto parts = split(text.substr(1, text.size() - 2), ',');
      const size_t plus = parts[0].find('+');
      if (plus != std::string::npos)
        made.offset = static_cast<i64>(number(trim(parts[0].substr(plus + 1))));
      made.parts.push_back(operand(trim(parts[0].substr(0, plus))));
      for (size_t i = 1; i < parts.size(); ++i) made.parts.push_back(operand(parts[i]));
      return made;
    }
    if (text == "_") return made.kind = Operand::kSink, made;
    if (text[0] == '!') {
      made = operand(trim(text.substr(1)));
      made.negated = true;
      return made;
    }
    if (std::isdigit(static_cast<u8>(text[0])) || text[0] == '-') return constant(number(text));
    if (const auto found = symbols_.find(text); found != symbols_.end()) {
      return constant(static_cast<u64>(found->second));
    }
    if (const auto found = parameter_numbers_.find(text); found != parameter_numbers_.end()) {
      made.kind = Operand::kParameter;
      made.index = found->second;
      return made;
    }
    made.kind = Operand::kRegister;
    made.index = find_register(text);
    return made;
  }

  void parse(std::string text, Instruction* in) {
    if (text[0] == '@') {
      const size_t end = text.find_first_of(" \t\n");
      in->predicate_negated = text[1] == '!';
      in->predicate =
          find_register(text.substr(1 + in->predicate_negated, end - 1 - in->predicate_negated));
      text = trim(text.substr(end));
    }
    const size_t end = std::min(text.find_first_of(" \t\n"), text.size());
    std::string name = text.substr(0, end);
    const std::string rest = trim(text.substr(end));
    for (size_t at; (at = name.find("::")) != std::string::npos;) name.replace(at, 2, "-");
    in->words = split(name, '.');
    std::vector<Type> types;
    for (const auto& word : in->words) {
      if (Type type; parse_type(word, &type)) types.push_back(type);
    }
    if (!types.empty()) in->type = types.front(), in->from = types.back();
    in->flush = in->has("ftz");
    in->vector = in->has("v2") ? 2 : in->has("v4") ? 4 : in->has("v8") ? 8 : 1;
    if (in->has("sat") || in->has("x2a")) throw Fault("unknown instruction");
    choose_operation(in);
    if (in->op == Op::kBranch || in->op == Op::kBranchIndexed) {
      const auto parts = split(rest, ',');
      if (in->op == Op::kBranchIndexed) in->sources.push_back(operand(parts[0]));
      unresolved_.push_back({static_cast<int>(kernel.code.size()), scoped_label(parts.back())});
      return;
    }
    auto parts = split(rest, ',');
    const bool stores =
        in->op == Op::kStore || in->op == Op::kStoreMatrix || in->op == Op::kCopy ||
        in->op == Op::kTensorCopy || in->op == Op::kBarrier || in->op == Op::kMbarrierInit ||
        in->op == Op::kMbarrierInvalidate || in->op == Op::kCopyWait || in->op == Op::kGroupWait ||
        in->op == Op::kWarpBarrier || in->op == Op::kNothing || in->op == Op::kReturn;
    size_t first = 0;
    if (!stores && !parts.empty()) {
      const auto results = split(parts[0], '|');
      in->to = operand(results[0]);
      if (results.size() > 1) in->second = operand(results[1]);
      first = 1;
    }
    for (size_t i = first; i < parts.size(); ++i) in->sources.push_back(operand(parts[i]));
  }

  void resolve() {
    for (const auto& [at, label] : unresolved_) {
      auto& targets = kernel.code[at].targets;
      if (kernel.code[at].op == Op::kBranchIndexed) {
        const auto found = branch_targets_.find(label.first);
        if (found == branch_targets_.end()) throw Fault("unknown label " + label.first);
        std::string list;
        for (size_t i = 0; i < found->second.size(); ++i) {  // without comments
          if (found->second.compare(i, 2, "//") == 0)
            i = std::min(found->second.find('\n', i), found->second.size() - 1);
          else
            list += found->second[i];
        }
        for (const auto& each : split(list, ',')) targets.push_back(target({each, 0}));
      } else {
        targets.push_back(target(label));
      }
    }
  }

  int target(const Scoped& label) const {
    const auto found = labels_.find(label);
    if (found == labels_.end()) throw Fault("unknown label " + label.first);
    return found->second;
  }

  int line_;
  std::vector<Scope> scopes_;
  int n_scopes_ = 0;
  std::map<Scoped, int> labels_;
  std::map<std::string, std::string> branch_targets_;
  std::vector<std::pair<int, Scoped>> unresolved_;
  std::map<std::string, int> symbols_, parameter_numbers_;
  std::string dynamic_;
  std::vector<u64> constant_values_;
};

}  // namespace

std::vector<Kernel> load(const std::string& ptx) {
  std::vector<Kernel> kernels;
  const size_t first = ptx.find(".entry");
  if (first == std::string::npos) throw Fault("no kernel in this PTX");
  const std::string module = ptx.substr(0, first);
  for (size_t at = first; at != std::string::npos; at = ptx.find(".entry", at + 1)) {
    const int line = 1 + static_cast<int>(std::count(ptx.begin(), ptx.begin() + at, '\n'));
    kernels.push_back(std::move(Loader(module, ptx.substr(at + 6), line).kernel));
  }
  return kernels;
}

}  // namespace emulator
