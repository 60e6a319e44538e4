#define ISA avx512
#include "avx512.h"
#include "dot.h"
#include "batched.h"
#include "linear.h"
#include "dequantize.h"
