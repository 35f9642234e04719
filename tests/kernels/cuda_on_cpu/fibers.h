// A stack for each lane, and the step from one to another. swapcontext makes a system call each time, so x86-64 has
// its own few instructions.
#pragma once

#if !defined(__x86_64__) || defined(EMULATOR_UCONTEXT)
#define EMULATOR_BY_UCONTEXT 1
#include <ucontext.h>
#endif

namespace emulator {

constexpr int LANES = 32;
constexpr size_t STACK = 1 << 18;  // bytes a lane, a page that faults below them

inline size_t page_bytes() { return size_t(sysconf(_SC_PAGESIZE)); }

// `bytes`, whole pages, between two pages that fault.
inline char* guarded(size_t bytes) {
    size_t page = page_bytes();
    void* all = mmap(nullptr, bytes + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) return nullptr;
    char* start = static_cast<char*>(all) + page;
    return mprotect(start, bytes, PROT_READ | PROT_WRITE) ? nullptr : start;
}

#ifdef EMULATOR_BY_UCONTEXT

struct Fiber {
    ucontext_t context;
};

inline void start_at(Fiber& fiber, char* stack, void (*entry)()) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
}

inline void step(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#else

// Of the registers only those that a call keeps: the rest is the caller's to save.
asm(R"(
.text
.p2align 4
.local emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, .-emulator_switch
)");
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void** from, void* to);

struct Fiber {
    void* stack_pointer;
};

inline void start_at(Fiber& fiber, char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + STACK) - 8;  // six registers, the entry, no one to return to
    memset(top, 0, 8 * sizeof(void*));
    top[6] = reinterpret_cast<void*>(entry);
    fiber.stack_pointer = top;
}

inline void step(Fiber& from, Fiber& to) {
    emulator_switch(&from.stack_pointer, to.stack_pointer);
    asm volatile("" ::: "memory");
}

#endif

}  // namespace emulator
