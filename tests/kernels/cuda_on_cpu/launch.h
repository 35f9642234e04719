// From a launch's arguments to the kernel's parameters, block by block.
#pragma once

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace emulator {

template <class T>
constexpr char kind_of() {
    return std::is_pointer_v<T> ? 'p' : std::is_floating_point_v<T> ? 'f' : std::is_integral_v<T> ? 'i' : 's';
}

// Of the kernel's parameters: as cuLaunchKernel has it, each argument is a pointer to the value.
template <class... P, size_t... I>
inline void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_cv_t<P>*>(arguments[I])...);
}

template <class... P>
constexpr size_t count(void (*)(P...)) {
    return sizeof...(P);
}

template <class... P>
inline int describe(void (*)(P...), char* kinds, int* sizes, int most) {
    const char all_kinds[] = {kind_of<P>()..., 0};
    const int all_sizes[] = {int(sizeof(P))..., 0};
    for (int i = 0; i < int(sizeof...(P)) && i < most; i++) kinds[i] = all_kinds[i], sizes[i] = all_sizes[i];
    return sizeof...(P);
}

static void** arguments;
static void (*kernel)();  // with the arguments of the launch

static void lane_runs() {
    kernel();
    lane_returns();
}

static void on_signal(int signal, siginfo_t* info, void*) {
    char *at = static_cast<char*>(info->si_addr), *stack = warp.stacks;
    size_t page = page_bytes(), apart = STACK + 2 * page;
    if (signal == SIGFPE) fault("after it, a division by zero");
    if (signal == SIGILL || signal == SIGTRAP)
        fault("after it, a pointer that its type does not allow, or an index outside its array");
    if (within(at, 0, stack - page, stack + LANES * apart) && (at < stack || size_t(at - stack) % apart >= STACK))
        fault("after it, more than %zu bytes of stack", STACK);
    if (within(at, 0, warp.shared - page, warp.shared_end + page))
        fault("after it, a read or write at %td of %td bytes of shared memory", at - warp.shared,
              warp.shared_end - warp.shared);
    fault("after it, a read or write at %p, where there is no memory", static_cast<void*>(at));
}

// The signals of a CPU's faults, caught on a stack of their own and given back at the end.
struct Signals {
    static constexpr int numbers[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
    struct sigaction before[5];
    stack_t stack_before;
    std::vector<char> stack = std::vector<char>(1 << 16);

    Signals() {
        stack_t mine = {};
        mine.ss_sp = stack.data(), mine.ss_size = stack.size();
        sigaltstack(&mine, &stack_before);
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < 5; i++) sigaction(numbers[i], &action, &before[i]);
    }
    ~Signals() {
        for (int i = 0; i < 5; i++) sigaction(numbers[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
};

static void run_block(char* stacks, size_t apart, u32 room, int direction) {
    warp.direction = direction, warp.current = direction > 0 ? 0 : LANES - 1;
    warp.arrived = warp.returned = 0;
    memset(warp.shared, 0xFF, room);  // NaN, of every float
    for (int i = 0; i < LANES; i++) {
        Lane& lane = warp.lanes[i];
        lane.copies.clear();
        lane.line = lane.group = 0, lane.waited = false;
        start_at(lane.fiber, stacks + i * apart, lane_runs);
    }
    step(warp.host, warp.lanes[warp.current].fiber);
    for (const char* p = warp.shared_end; p < warp.shared + room; p++)
        if (*p != '\xFF') fault("the block wrote behind its shared memory");
}

// 0, or 1 and a message. Lanes take turns upwards in the first block, or downwards, and the other way in the next.
static int run(u32 x, u32 y, u32 shared_bytes, bool backwards) {
    static char* stacks = guarded(LANES * (STACK + 2 * page_bytes()));
    size_t page = page_bytes(), apart = STACK + 2 * page;
    u32 room = (shared_bytes + 127) / 128 * 128;  // its end touches the page that faults
    size_t pages = (room / page + 1) * page;
    char* shared = guarded(pages);
    Signals signals;
    warp.stacks = stacks, warp.shared = shared + pages - room, warp.shared_end = warp.shared + shared_bytes;
    warp.grid[0] = x, warp.grid[1] = y;
    for (int i = 0; i < LANES; i++) mprotect(stacks + i * apart + STACK, 2 * page, PROT_NONE);
    volatile int failed = sigsetjmp(warp.escape, 1);
    if (!failed)
        for (u32 j = 0; j < y; j++)
            for (u32 i = 0; i < x; i++) {
                warp.block[0] = i, warp.block[1] = j;
                run_block(stacks, apart, room, (i + j + backwards) % 2 ? -1 : 1);
            }
    munmap(shared - page, pages + 2 * page);
    return failed;
}

}  // namespace emulator

EXPORT const char* emulator_message() { return emulator::message; }

#define EMULATE(name)                                                                                               \
    EXPORT int emulator_parameters(char* kinds, int* sizes, int most) {                                             \
        return emulator::describe(&name, kinds, sizes, most);                                                       \
    }                                                                                                               \
    EXPORT int emulator_run(u32 grid_x, u32 grid_y, u32 shared_bytes, bool backwards,                               \
                            const emulator::Buffer* buffers, int num_buffers, void** arguments, u64* calls) {       \
        emulator::arguments = arguments;                                                                            \
        emulator::kernel = [] {                                                                                     \
            constexpr auto all = std::make_index_sequence<emulator::count(&name)>();                                \
            emulator::call(&name, emulator::arguments, all);                                                 \
        };                                                                                                          \
        emulator::warp.buffers = buffers, emulator::warp.num_buffers = num_buffers;                                 \
        emulator::calls = {};                                                                                       \
        int failed = emulator::run(grid_x, grid_y, shared_bytes, backwards);                                        \
        memcpy(calls, &emulator::calls, sizeof emulator::calls);                                                    \
        return failed;                                                                                              \
    }
