// Pieces of PTX's text.
#pragma once

#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "program.h"

namespace emulator {

inline std::string trim(const std::string& text) {
  const size_t first = text.find_first_not_of(" \t\r\n"), last = text.find_last_not_of(" \t\r\n");
  return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

inline std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (const char c : text) {
    if (c == '{' || c == '[') ++depth;
    if (c == '}' || c == ']') --depth;
    if (c == at && depth == 0) {
      parts.push_back(trim(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trim(part).empty()) parts.push_back(trim(part));
  return parts;
}

inline bool parse_type(const std::string& word, Type* type) {
  if (word == "pred") return *type = {'p', 1, false}, true;
  if (word == "bf16") return *type = {'B', 16, false}, true;
  if (word == "bf16x2") return *type = {'B', 32, true}, true;
  if (word == "f16x2") return *type = {'f', 32, true}, true;
  if (word.size() < 2 || !std::strchr("busf", word[0])) return false;
  for (const int bits : {8, 16, 32, 64}) {
    if (word.substr(1) == std::to_string(bits)) return *type = {word[0], bits, false}, true;
  }
  return false;
}

// The type that a declaration names, as in `.param .u64 .ptr .global name`.
inline Type type_of(const std::string& declaration) {
  std::istringstream words(declaration);
  Type type;
  for (std::string word; words >> word;) {
    if (word[0] == '.' && parse_type(word.substr(1), &type)) return type;
  }
  throw Fault("no type in the declaration " + declaration);
}

// The operation of an instruction and what its name says of it; throws Fault for one that is
// unknown.
void choose_operation(Instruction* in);

}  // namespace emulator
