// SPDX-License-Identifier: Apache-2.0
// The C interface of the native library: attention of a few query rows over keys and values that
// lie in host memory, two jobs of the same thread pool on plain memory, and a queue of reads and
// writes of a file, which has threads of its own.
//
// Every function may be called from any thread; calls that need the pool wait for each other.
// Memory is read and written only inside what the shapes and strides describe.
#ifndef HEADINFER_NATIVE_H
#define HEADINFER_NATIVE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HEADINFER_EXPORT __attribute__((visibility("default")))

// Raised whenever a signature or the struct below changes; the caller refuses any other value.
#define HEADINFER_ABI 5
#define HEADINFER_MAX_THREADS 1024
#define HEADINFER_MAX_DIM 1024

enum headinfer_status {
  HEADINFER_OK = 0,
  HEADINFER_NULL_POINTER = 1,
  HEADINFER_BAD_SHAPE = 2,
  HEADINFER_BAD_THREADS = 3,
  HEADINFER_BAD_LEVEL = 4,
  HEADINFER_BAD_TYPE = 5,
  HEADINFER_NO_MEMORY = 6,
  HEADINFER_SYSTEM_ERROR = 7,
  HEADINFER_CORRUPT = 8,  // a packed block that no encoder wrote, or not with that checksum
  HEADINFER_NO_ENTRIES = 9
};

enum headinfer_type { HEADINFER_FLOAT32 = 0, HEADINFER_BFLOAT16 = 1, HEADINFER_FLOAT16 = 2 };

enum headinfer_bias { HEADINFER_NO_BIAS = 0, HEADINFER_BOOL_BIAS = 1, HEADINFER_FLOAT_BIAS = 2 };

// One attention call. Strides count elements of the tensor's own type, may be 0 or negative, and
// stand in the order batch, head, token, dim. Keys, values: the last dim is contiguous.
typedef struct headinfer_attend_args {
  const void *q;     // [batch, kv_heads * q_per_kv, rows, key_dim]
  const void *k;     // [batch, kv_heads, keys, key_dim]
  const void *v;     // [batch, kv_heads, keys, value_dim]
  const void *bias;  // [batch, kv_heads * q_per_kv, rows, keys], or null
  float *out;        // [batch, kv_heads * q_per_kv, rows, value_dim], contiguous
  float *lse;        // [batch, kv_heads * q_per_kv, rows], contiguous
  int64_t batch, kv_heads, q_per_kv, rows, keys, key_dim, value_dim;
  int64_t q_stride[4];
  int64_t k_stride[3];
  int64_t v_stride[3];
  int64_t bias_stride[4];
  float scale;     // factor on q k^T
  float softcap;   // scores x become softcap * tanh(x / softcap) before the bias; 0: they stay
  int32_t type;    // headinfer_type of q, k and v
  int32_t biased;  // headinfer_bias; bool bytes hide keys where 0, floats are added
  int32_t causal;  // needs rows == keys; row i sees keys 0..i
  int32_t threads; // 1..HEADINFER_MAX_THREADS, the calling one included
  int32_t level;   // index of an instruction level, or -1 for the best this CPU runs
} headinfer_attend_args;

// Keys or values of bfloat16 in packed blocks of 128 tokens, as docs/lossless.md has the bytes. A run
// of blocks of one head is contiguous.
typedef struct headinfer_packed {
  uint8_t *slots;               // of the first row, head and block
  const int64_t *rows;          // [batch] bytes from `slots` to each row
  const uint8_t *const *chunks; // overflow entries: equal runs of `chunk_entries`
  int64_t head_stride;          // bytes
  int64_t chunk_entries;
  int64_t entries;              // in all chunks together
} headinfer_packed;

HEADINFER_EXPORT int32_t headinfer_abi(void);

// Instruction levels built into this library, best first.
HEADINFER_EXPORT int32_t headinfer_level_count(void);
HEADINFER_EXPORT const char *headinfer_level_name(int32_t level);
HEADINFER_EXPORT int32_t headinfer_level_runs(int32_t level);

// Fills out and lse; a row that sees no key gets 0 and -inf. Bits do not depend on `threads`.
HEADINFER_EXPORT int32_t headinfer_attend(const headinfer_attend_args *args);

// As headinfer_attend, with `packed` tokens, whole blocks, of keys and values in packed blocks and the
// tokens after them in args->k and args->v. Same bits as over plain ones. Where a block is damaged the
// answer is HEADINFER_CORRUPT, and `damaged` says where: 0 keys or 1 values, row, head, block.
HEADINFER_EXPORT int32_t headinfer_attend_packed(const headinfer_attend_args *args,
                                                 const headinfer_packed *k,
                                                 const headinfer_packed *v, int64_t packed,
                                                 int64_t damaged[4]);

// Encodes (encode != 0) values into slots or decodes slots into values: [batch, heads, blocks x 128, dim]
// of bfloat16 in `values`, whose strides count elements; the last dim is contiguous. Encoding takes
// overflow entries from free[0 .. free_count), in no certain order, and says in `used` how many;
// if these do not suffice the answer is HEADINFER_NO_ENTRIES. Decoding compares checksums if `verify`.
typedef struct headinfer_recode_args {
  uint16_t *values;
  const int32_t *free;
  int64_t value_stride[3]; // batch, head, token
  int64_t batch, heads, blocks, dim;
  int64_t free_count;
  int64_t used;       // written
  int64_t damaged[4]; // written
  int32_t encode, verify, threads, level;
} headinfer_recode_args;

HEADINFER_EXPORT int32_t headinfer_recode(headinfer_recode_args *args,
                                          const headinfer_packed *packed);
// The keys and values of a call of a job in packed blocks, as headinfer_attend_packed has them;
// tokens is 0 where they are plain.
typedef struct headinfer_near_packed {
  headinfer_packed k, v;
  int64_t tokens;
  int64_t damaged[4]; // written
} headinfer_near_packed;

// Attention over a context that lies in several runs: `calls`, at least one, agree in everything
// but their keys, values and bias. One call writes to out and lse itself; the results of several go
// wherever each call says and are merged into out and lse.
typedef struct headinfer_near_job {
  const headinfer_attend_args *calls;
  headinfer_near_packed *packed; // one for each call, or null
  float *out;  // [batch, kv_heads * q_per_kv, rows, value_dim], contiguous
  float *lse;  // [batch, kv_heads * q_per_kv, rows], contiguous
  double started, ended;  // written: seconds of the monotonic clock
  int32_t count;
  int32_t status;  // written: headinfer_status of the first call that failed; out and lse are NaN
} headinfer_near_job;

// Does a headinfer_near_job; a host function of a CUDA stream (CUhostFn).
HEADINFER_EXPORT void headinfer_near_run(void *job);

// Backs every page of [memory, memory + nbytes) with physical memory; contents stay as they are.
HEADINFER_EXPORT int32_t headinfer_touch(void *memory, int64_t nbytes, int32_t threads);

// Reads [memory, memory + nbytes) once with all threads; `seconds` is the wall time it took.
HEADINFER_EXPORT int32_t headinfer_read(const void *memory, int64_t nbytes, int32_t threads,
                                        double *seconds);

// What a queue is to move: `nbytes` at `offset` of the file, from or to `memory`.
typedef struct headinfer_disk_op {
  int64_t offset;
  void *memory;
  int64_t nbytes;
} headinfer_disk_op;

// Where a job failed first; code is 0 if it did not. `done` bytes of `nbytes` had been moved.
typedef struct headinfer_disk_fault {
  int32_t code;  // errno, or HEADINFER_DISK_SHORT
  int64_t offset, nbytes, done;
} headinfer_disk_fault;

// The file ended before the bytes asked for.
#define HEADINFER_DISK_SHORT (-1)

// A queue on `fd`, which stays open until the queue is closed. `alignment` is what direct I/O needs
// of offsets, sizes and memory; 0 where the file is not opened for it. Null if it cannot be had.
HEADINFER_EXPORT void *headinfer_disk_open(int32_t fd, int64_t alignment, int64_t piece_bytes,
                                           int32_t threads);

// The number of a new job, larger than all before; -1 without memory. Reads wait for the writes
// numbered up to `after`. Bytes that a write failed to change cannot be read until another has.
HEADINFER_EXPORT int64_t headinfer_disk_job(void *queue, int32_t write, int64_t after);

// Begins a job; the memory stays, unchanged, until it is over.
HEADINFER_EXPORT int32_t headinfer_disk_start(void *queue, int64_t job,
                                              const headinfer_disk_op *ops, int64_t count);

// Ends a job that was not begun, as failed with `code`.
HEADINFER_EXPORT int32_t headinfer_disk_fail(void *queue, int64_t job, int32_t code,
                                             const headinfer_disk_op *ops, int64_t count);

// 1 if a job is over, after waiting for it if told to `block`; 0 if not. `forget` drops its record,
// and a job that is not known any more is over, without a fault.
HEADINFER_EXPORT int32_t headinfer_disk_ask(void *queue, int64_t job, int32_t block, int32_t forget,
                                            headinfer_disk_fault *fault);

// 1 and the range of bytes number `place`, from 0 on, that no write has changed since one failed to,
// neighbours within a block of the file included; 0 if there are not as many.
HEADINFER_EXPORT int32_t headinfer_disk_lost(void *queue, int64_t place,
                                             headinfer_disk_fault *fault);

// Returns when no job is under way.
HEADINFER_EXPORT void headinfer_disk_drain(void *queue);

// Ends the threads; nothing may be under way or waited for.
HEADINFER_EXPORT void headinfer_disk_close(void *queue);

#ifdef __cplusplus
}
#endif

#endif
