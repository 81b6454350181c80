// What every use has its own copy of: a body that stays out of line would be one for all instruction sets.
#pragma once

#define FASTVIT_INLINE inline __attribute__((always_inline))
