// Collectives that hand words from lane to lane.
#pragma once

namespace emulator {

// All lanes bring x; source(lane, of) is the lane whose x it takes, by the `of` that it brings too.
template <class Source>
inline u32 exchange(const char* kind, int line, u32 x, u32 of, Source source) {
    Lane& me = self(line);
    me.in[0] = x, me.in[1] = of;
    if (last_to_arrive(kind, line))
        for (u32 i = 0; i < LANES; i++) {
            Lane& taker = warp.lanes[i];
            taker.out[0] = warp.lanes[source(i, taker.in[1] & 31)].in[0];
        }
    return me.out[0];
}

inline u32 vote(const char* kind, int line, bool x) {
    Lane& me = self(line);
    me.in[0] = x;
    if (last_to_arrive(kind, line)) {
        u32 bits = 0;
        for (int i = 0; i < LANES; i++) bits |= warp.lanes[i].in[0] << i;
        for (Lane& taker : warp.lanes) taker.out[0] = bits;
    }
    return me.out[0];
}

inline u32 from_lane(u32, u32 of) { return of; }
inline u32 by_xor(u32 lane, u32 mask) { return lane ^ mask; }
inline u32 by_up(u32 lane, u32 by) { return lane < by ? lane : lane - by; }

template <class To, class From>
inline To bits_of(From x) {
    static_assert(sizeof(To) == 4 && sizeof(From) == 4, "a lane hands on words of 32 bits");
    To y;
    memcpy(&y, &x, 4);
    return y;
}

}  // namespace emulator

#define EXCHANGE(name, type, source)                                                                                \
    DEVICE type name(type x, u32 of, LINE) {                                                                        \
        return emulator::bits_of<type>(                                                                             \
            emulator::exchange(#name, line, emulator::bits_of<u32>(x), of, emulator::source));                      \
    }
EXCHANGE(shfl, u32, from_lane)
EXCHANGE(shfl, int, from_lane)
EXCHANGE(shfl, float, from_lane)
EXCHANGE(shfl_xor, u32, by_xor)
EXCHANGE(shfl_xor, int, by_xor)
EXCHANGE(shfl_xor, float, by_xor)
EXCHANGE(shfl_up, u32, by_up)
EXCHANGE(shfl_up, int, by_up)
EXCHANGE(shfl_up, float, by_up)
#undef EXCHANGE

namespace emulator {

// All lanes get what joining makes of all their x.
template <class Join>
inline int reduced(const char* kind, int line, int x, Join join) {
    Lane& me = self(line);
    me.in[0] = u32(x);
    if (last_to_arrive(kind, line)) {
        int all = int(warp.lanes[0].in[0]);
        for (int i = 1; i < LANES; i++) all = join(all, int(warp.lanes[i].in[0]));
        for (Lane& taker : warp.lanes) taker.out[0] = u32(all);
    }
    return int(me.out[0]);
}

inline int sum(int a, int b) { return int(u32(a) + u32(b)); }
inline int greater(int a, int b) { return a > b ? a : b; }

}  // namespace emulator

DEVICE int sum_of_all(int x, LINE) { return emulator::reduced("sum_of_all", line, x, emulator::sum); }
DEVICE int largest_of_all(int x, LINE) { return emulator::reduced("largest_of_all", line, x, emulator::greater); }
DEVICE u32 ballot(bool x, LINE) { return emulator::vote("ballot", line, x); }
DEVICE bool any(bool x, LINE) { return emulator::vote("any", line, x) != 0; }
DEVICE void syncwarp(LINE) { emulator::vote("syncwarp", line, true); }
