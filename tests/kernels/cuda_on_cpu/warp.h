// The lanes of a warp, where they meet, and what happens when they do not.
#pragma once

namespace emulator {

struct Buffer {
    const char* start;
    u64 bytes;
};

struct Copy {  // one copy_async that has not come to its wait
    char* to;
    const char* from;
    u32 bytes, group;
};

struct Lane {
    Fiber fiber;
    int line;  // of the primitive it called last
    u32 in[10], out[4];  // what it brings to a meeting, and takes from it
    u32 group;  // of copies, the one still open
    std::vector<Copy> copies;
    bool waited;  // for the kernel before it
};

struct Warp {
    Lane lanes[LANES];
    Fiber host;
    char* stacks;
    int current, direction;  // the lane that runs, and +1 or -1: the lane after it
    int arrived, first, returned;  // lanes at the meeting, the one that came first, lanes that are through
    const char* meeting;
    u32 block[2], grid[2];
    char *shared, *shared_end;
    const Buffer* buffers;
    int num_buffers;
    sigjmp_buf escape;
};

static Warp warp;
static char message[1024];

// The launch ends here, with a message; the lanes' stacks are left as they are.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fault(const char* text, ...) {
    int at = snprintf(message, sizeof message, "block (%u, %u), lane %d, line %d: ", warp.block[0], warp.block[1],
                      warp.current, warp.lanes[warp.current].line);
    va_list values;
    va_start(values, text);
    vsnprintf(message + at, sizeof message - at, text, values);
    va_end(values);
    siglongjmp(warp.escape, 1);
}

inline Lane& self(int line) {
    Lane& lane = warp.lanes[warp.current];
    lane.line = line;
    return lane;
}

inline void next_lane() {
    int from = warp.current;
    warp.current += warp.direction;
    step(warp.lanes[from].fiber, warp.lanes[warp.current].fiber);
}

// Whether the lane is the last of the warp to come to this place, and so computes for all. The others come back from
// here when that is done. The last one goes on first and the others follow in the opposite order, so a lane that
// reads what another writes after the same meeting reads it too early in one block or in the next.
inline bool last_to_arrive(const char* kind, int line) {
    if (warp.returned) fault("%s, but %d lanes have returned", kind, warp.returned);
    if (!warp.arrived) {
        warp.meeting = kind;
        warp.first = warp.current;
    } else if (int other = warp.lanes[warp.first].line; line != other || strcmp(kind, warp.meeting)) {
        fault("%s, but lane %d is at %s in line %d", kind, warp.first, warp.meeting, other);
    }
    if (++warp.arrived < LANES) {
        next_lane();
        return false;
    }
    warp.arrived = 0;
    warp.direction = -warp.direction;
    return true;
}

[[noreturn]] inline void lane_returns() {
    if (warp.arrived) fault("returns, but lane %d is at %s in line %d", warp.first, warp.meeting,
                            warp.lanes[warp.first].line);
    if (++warp.returned < LANES) next_lane();
    step(warp.lanes[warp.current].fiber, warp.host);
    __builtin_unreachable();
}

inline bool within(const void* start, u64 bytes, const void* from, const void* to) {
    uintptr_t first = uintptr_t(start), low = uintptr_t(from), high = uintptr_t(to);
    return first >= low && first <= high && bytes <= high - first;
}

inline bool registered(const void* start, u64 bytes) {
    for (int i = 0; i < warp.num_buffers; i++) {
        const Buffer& one = warp.buffers[i];
        if (within(start, bytes, one.start, one.start + one.bytes)) return true;
    }
    return false;
}

}  // namespace emulator

DEVICE u32 lane() { return emulator::warp.current; }
DEVICE u32 block_x() { return emulator::warp.block[0]; }
DEVICE u32 block_y() { return emulator::warp.block[1]; }
DEVICE u32 grid_x() { return emulator::warp.grid[0]; }
DEVICE u32 grid_y() { return emulator::warp.grid[1]; }
