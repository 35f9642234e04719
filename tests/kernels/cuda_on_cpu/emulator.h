// In place of the GPU's primitives, for a kernel's text that a C++ compiler makes into code for a CPU. One warp is one
// block; its lanes are fibers that take turns. What the primitives do is what PTX says of their instructions.
#pragma once

#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE static inline
#define MEMBER inline
#define KERNEL extern "C" void
#define LINE int line = __builtin_LINE()  // a parameter: the line of the caller

#include "fibers.h"
#include "warp.h"

#include "arithmetic.h"
#include "exchange.h"
#include "matrices.h"
#include "memory.h"

#include "launch.h"

#undef LINE
