// token_depthwise_conv on the CPU, compiled once per instruction set: one unit, since the passes share most of the
// code.
#include "token_depthwise_conv/cpu_forward.h"
#include "token_depthwise_conv/cpu_gradient.h"
#include "token_depthwise_conv/cpu_passes.h"
