// Reports an error in a kernel: prints one line with kernel, block and thread, and exits with code
// 1.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "language.h"
#include "sanitizers.h"

namespace variant::emulation {

// A source location: that of the call for which the default argument `Site site = Site::here()` is
// evaluated.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  std::string text() const {
    const char* slash = std::strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
  }
};

// The running kernel, block and thread; set by the scheduler.
struct Position {
  const void* kernel = nullptr;
  Site launched{"?", 0};
  bool in_thread = false;
};
inline Position position;

// The name of a function of this program, from the program's symbol table: kernels usually have
// internal linkage, and dladdr does not find those.
inline std::string function_name(const void* function) {
  Dl_info info{};
  if (!function || !dladdr(function, &info)) return "?";
  std::FILE* file = std::fopen(info.dli_fname, "rb");
  if (!file) file = std::fopen("/proc/self/exe", "rb");
  if (!file) return "?";
  std::vector<char> image;
  char buffer[1 << 16];
  for (size_t got; (got = std::fread(buffer, 1, sizeof(buffer), file)) > 0;) {
    image.insert(image.end(), buffer, buffer + got);
  }
  std::fclose(file);
  Elf64_Ehdr head;
  if (image.size() < sizeof(head)) return "?";
  std::memcpy(&head, image.data(), sizeof(head));
  std::vector<Elf64_Shdr> sections(head.e_shnum);
  std::memcpy(sections.data(), image.data() + head.e_shoff, sizeof(Elf64_Shdr) * head.e_shnum);
  const uint64_t base = head.e_type == ET_DYN ? reinterpret_cast<uint64_t>(info.dli_fbase) : 0;
  const uint64_t offset = reinterpret_cast<uint64_t>(function) - base;
  for (const Elf64_Shdr& section : sections) {
    if (section.sh_type != SHT_SYMTAB) continue;
    for (uint64_t at = 0; at < section.sh_size; at += sizeof(Elf64_Sym)) {
      Elf64_Sym symbol;
      std::memcpy(&symbol, image.data() + section.sh_offset + at, sizeof(symbol));
      if (symbol.st_value != offset || ELF64_ST_TYPE(symbol.st_info) != STT_FUNC) continue;
      const char* raw = image.data() + sections[section.sh_link].sh_offset + symbol.st_name;
      int status = 1;
      char* readable = abi::__cxa_demangle(raw, nullptr, nullptr, &status);
      std::string name = status == 0 ? readable : raw;
      std::free(readable);
      return name;
    }
  }
  return "?";
}

inline std::string text_of(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

// "kernel NAME (launched at FILE:LINE), block (x, y, z), thread (x, y, z)", without the parts that
// are unknown.
inline std::string where_we_are() {
  if (!position.kernel) return "no kernel running";
  std::string text = "kernel " + function_name(position.kernel) + " (launched at " +
                     position.launched.text() + ")";
  if (position.in_thread) {
    text += ", block " + text_of(blockIdx) + ", thread " + text_of(threadIdx);
  }
  return text;
}

// _Exit: destructors and leak checks would run while other fibers are still on their stacks.
[[noreturn]] inline void fault(const std::string& message) {
  const Unwatched unwatched;
  std::fflush(stdout);
  std::fprintf(stderr, "emulation: %s: %s\n", where_we_are().c_str(), message.c_str());
  std::fflush(stderr);
  std::_Exit(1);
}

// Appends the running kernel, block and thread to a sanitizer's report.
inline void name_place_in_reports() {
#if defined(VARIANT_ASAN) || defined(VARIANT_TSAN)
  __sanitizer_set_death_callback([] {
    const Unwatched unwatched;
    if (position.kernel) std::fprintf(stderr, "emulation: while in %s\n", where_we_are().c_str());
  });
#endif
}

}  // namespace variant::emulation
