// Shared memory, copies into it that arrive late, and what a kernel tells its neighbours.
#pragma once

namespace emulator {

constexpr u32 SHARED_START = 1024;  // the address of shared memory: not 0 on a GPU either

struct Calls {  // one for each lane
    u64 waits, releases, prefetches;
};
static Calls calls;

inline char* in_shared(u32 address, u32 bytes, u32 alignment, const char* kind) {
    u32 size = u32(warp.shared_end - warp.shared), offset = address - SHARED_START;
    if (address < SHARED_START || offset > size || bytes > size - offset)
        fault("%s of %u bytes at %d of %u bytes of shared memory", kind, bytes, int(offset), size);
    if (address % alignment)
        fault("%s at %u of shared memory, which is not a multiple of %u", kind, offset, alignment);
    return warp.shared + offset;
}

}  // namespace emulator

DEVICE char* shared_memory() { return emulator::warp.shared; }

DEVICE u32 shared_address(const void* p, LINE) {
    emulator::self(line);
    if (!emulator::within(p, 0, emulator::warp.shared, emulator::warp.shared_end))
        emulator::fault("shared_address of %p, which is not in shared memory", p);
    return emulator::SHARED_START + u32(static_cast<const char*>(p) - emulator::warp.shared);
}

// The bytes arrive when their lane waits for their group. Until then there is poison at their place.
template <int BYTES>
DEVICE void copy_async(u32 shared, const void* global, LINE) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    emulator::Lane& me = emulator::self(line);
    char* to = emulator::in_shared(shared, BYTES, BYTES, "copy_async");
    if (reinterpret_cast<uintptr_t>(global) % BYTES)
        emulator::fault("copy_async from %p, which is not a multiple of %d", global, BYTES);
    if (!emulator::registered(global, BYTES))
        emulator::fault("copy_async of %d bytes from %p, which no buffer holds", BYTES, global);
    memset(to, 0xFF, BYTES);
    me.copies.push_back({to, static_cast<const char*>(global), BYTES, me.group});
}

DEVICE void copy_commit(LINE) { emulator::self(line).group++; }

template <int N>
DEVICE void copy_wait(LINE) {
    emulator::Lane& me = emulator::self(line);
    size_t done = 0;
    for (; done < me.copies.size() && me.copies[done].group + N < me.group; done++)
        memcpy(me.copies[done].to, me.copies[done].from, me.copies[done].bytes);
    me.copies.erase(me.copies.begin(), me.copies.begin() + done);
}

DEVICE void prefetch_l2(const void* p, LINE) {
    emulator::self(line);
    if (!emulator::registered(p, 1)) emulator::fault("prefetch_l2 of %p, which no buffer holds", p);
    emulator::calls.prefetches++;
}

DEVICE void prefetch_l1(const void* p, LINE) { prefetch_l2(p, line); }

DEVICE void wait_ahead(LINE) {
    emulator::self(line).waited = true;
    emulator::calls.waits++;
}

DEVICE void release_next(LINE) {
    if (!emulator::self(line).waited) emulator::fault("release_next before wait_ahead");
    emulator::calls.releases++;
}
