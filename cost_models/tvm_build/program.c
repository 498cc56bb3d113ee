/* Calls a network's kernels in order, without TVM's runtime.
 *
 *   program INPUT OUTPUT [REPEATS [COUNTERS]]
 *
 * INPUT and OUTPUT are files of raw float32 numbers, channels last. The network runs REPEATS times (1), and the mean
 * time of one run in milliseconds is printed. If the kernels' code has counters, all bytes between its symbols
 * `kernel_counters` and `kernel_counters_end` are written to the file COUNTERS.
 */
#define _POSIX_C_SOURCE 200809L
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* As in dlpack.h and tvm/ffi/c_api.h. */
typedef struct {
  int32_t type, id;
} Device;
typedef struct {
  uint8_t code, bits;
  uint16_t lanes;
} DataType;
typedef struct {
  void *data;
  Device device;
  int32_t dimensions;
  DataType type;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} Tensor;
typedef struct {
  int32_t type;
  uint32_t zero;
  union {
    int64_t integer;
    void *pointer;
  } value;
} Any;
typedef int Kernel(void *, const Any *, int32_t, Any *);
typedef struct {
  const char *name;
  Kernel *kernel;
  int first, count;
} Call;

#define CPU {1, 0}
#define FLOAT32 {2, 32, 1}
#define TENSOR 7 /* kTVMFFIDLTensorPtr */
#define MOST_ARGUMENTS 64

#include "network.h" /* arena, tensors, calls, INPUT_*, OUTPUT_* */

extern void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) __attribute__((weak));
extern int (*__TVMBackendFreeWorkspace)(int, int, void *) __attribute__((weak));
extern char kernel_counters[] __attribute__((weak)), kernel_counters_end[] __attribute__((weak));

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count);

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; i++)
    if (parts[i]) fputs(parts[i], stderr);
  fputc('\n', stderr);
}

static void *allocate(int device, int id, uint64_t bytes, int code, int bits) {
  (void)device, (void)id, (void)code, (void)bits;
  return aligned_alloc(64, (size_t)(bytes + 63) & ~(size_t)63);
}

static int release(int device, int id, void *memory) {
  (void)device, (void)id;
  free(memory);
  return 0;
}

static void fail(const char *what, const char *which) {
  fprintf(stderr, "%s %s\n", what, which);
  exit(1);
}

static void transfer(const char *path, const char *mode, void *data, size_t bytes) {
  FILE *file = fopen(path, mode);
  if (!file) fail("cannot open", path);
  size_t done = *mode == 'r' ? fread(data, 1, bytes, file) : fwrite(data, 1, bytes, file);
  if (done != bytes || fclose(file)) fail("wrong size or full disk:", path);
}

static void run(void) {
  Any arguments[MOST_ARGUMENTS], result;
  for (size_t c = 0; c < sizeof calls / sizeof *calls; c++) {
    for (int i = 0; i < calls[c].count; i++) {
      arguments[i].type = TENSOR;
      arguments[i].zero = 0;
      arguments[i].value.integer = 0;
      arguments[i].value.pointer = &tensors[calls[c].first + i];
    }
    memset(&result, 0, sizeof result);
    if (calls[c].kernel(0, arguments, calls[c].count, &result)) fail("error in kernel", calls[c].name);
  }
}

int main(int count, char **arguments) {
  if (count < 3) fail("usage: program INPUT OUTPUT [REPEATS [COUNTERS]]", "");
  int repeats = count > 3 ? atoi(arguments[3]) : 1;
  if (repeats < 1) fail("REPEATS must be at least 1, not", arguments[3]);
  if (&__TVMBackendAllocWorkspace) __TVMBackendAllocWorkspace = allocate;
  if (&__TVMBackendFreeWorkspace) __TVMBackendFreeWorkspace = release;
  transfer(arguments[1], "rb", arena + INPUT_OFFSET, INPUT_BYTES);
  struct timespec begin, end;
  clock_gettime(CLOCK_MONOTONIC, &begin);
  for (int i = 0; i < repeats; i++) run();
  clock_gettime(CLOCK_MONOTONIC, &end);
  double seconds = (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec);
  printf("%.6f\n", 1e3 * seconds / repeats);
  transfer(arguments[2], "wb", arena + OUTPUT_OFFSET, OUTPUT_BYTES);
  if (count > 4 && kernel_counters)
    transfer(arguments[4], "wb", kernel_counters, (size_t)(kernel_counters_end - kernel_counters));
  return 0;
}
