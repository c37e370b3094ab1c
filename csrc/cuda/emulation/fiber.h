// A fiber: a stack that can be suspended and resumed. Each CUDA thread is one fiber.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#if !defined(__x86_64__) || defined(VARIANT_EMULATION_UCONTEXT)
#include <ucontext.h>
#define VARIANT_UCONTEXT 1
#endif

#include "sanitizers.h"

#ifndef VARIANT_UCONTEXT
// Saves the callee-saved registers of the System V ABI on the old stack. Weak, because every file
// that includes this header defines it.
extern "C" void variant_emulation_switch(void** left, void* entered);
asm(R"(
  .pushsection .text
  .weak variant_emulation_switch
  .type variant_emulation_switch, @function
variant_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size variant_emulation_switch, . - variant_emulation_switch
  .popsection
)");
#endif

namespace variant::emulation {

class Fiber {
 public:
  static constexpr size_t kStackBytes = 256 * 1024;

  // The process's first context, which already has a stack.
  Fiber() {
#ifdef VARIANT_TSAN
    tsan_ = __tsan_get_current_fiber();
#endif
  }

  // A fiber that runs body() when it is first entered; body must not return.
  explicit Fiber(void (*body)()) : body_(body) {
    const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) {
      std::perror("emulation: no memory for a thread's stack");
      std::_Exit(1);
    }
    bottom_ = static_cast<char*>(memory) + guard;
    bytes_ = kStackBytes;
#ifdef VARIANT_TSAN
    tsan_ = __tsan_create_fiber(0);
#endif
#ifdef VARIANT_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = bottom_;
    context_.uc_stack.ss_size = bytes_;
    context_.uc_link = nullptr;
    makecontext(&context_, &Fiber::enter, 0);
#else
    // The stack layout of variant_emulation_switch: control words, six registers, return address.
    char* at = bottom_ + bytes_ - 16;
    void (*entry)() = &Fiber::enter;
    std::memcpy(at, &entry, sizeof(entry));
    at -= 6 * 8 + 8;
    const uint32_t control[2] = {0x1f80, 0x037f};
    std::memcpy(at, control, sizeof(control));
    stack_ = at;
#endif
  }

  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Suspends this fiber, which must be the running one, and runs `next`.
  void switch_to(Fiber& next) {
    arriving_ = &next;
    leaving_ = this;
#ifdef VARIANT_ASAN
    __sanitizer_start_switch_fiber(&fake_stack_, next.bottom_, next.bytes_);
#endif
#ifdef VARIANT_TSAN
    __tsan_switch_to_fiber(next.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef VARIANT_UCONTEXT
    swapcontext(&context_, &next.context_);
#else
    variant_emulation_switch(&stack_, next.stack_);
#endif
    arrived();
  }

 private:
  static void enter() {
    arriving_->arrived();
    arriving_->body_();
    std::abort();
  }

  void arrived() {
#ifdef VARIANT_ASAN
    const void* bottom = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &bytes);
    leaving_->bottom_ = static_cast<char*>(const_cast<void*>(bottom));
    leaving_->bytes_ = bytes;
#endif
  }

  inline static Fiber* arriving_ = nullptr;
  inline static Fiber* leaving_ = nullptr;

  void (*body_)() = nullptr;
  char* bottom_ = nullptr;
  size_t bytes_ = 0;
#ifdef VARIANT_UCONTEXT
  ucontext_t context_;
#else
  void* stack_ = nullptr;
#endif
#ifdef VARIANT_ASAN
  void* fake_stack_ = nullptr;
#endif
#ifdef VARIANT_TSAN
  void* tsan_ = nullptr;
#endif
};

}  // namespace variant::emulation
