// AVX-512 with the product of pairs of bf16.
#define ISA avx512_bf16
#include "avx512.h"
#include "dot.h"
#include "pairs.h"
#include "batched.h"
#include "linear.h"
