/* fake_nvrtc.c: an NVRTC that compiles nothing and notes what it was asked for, one line a kernel, in the file that FAKE_NVRTC_LIST names:
 * ARCH KERNEL ENTRY NAME=VALUE ... With the fake driver beside it the engine runs its whole host side on any model of GPU. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char code[] = "\177ELF, as far as the fake driver looks";

const char *nvrtcGetErrorString(int result) { return result ? "fake error" : "no error"; }

int nvrtcVersion(int *major, int *minor) {
  *major = 13;
  *minor = 0;
  return 0;
}

int nvrtcCreateProgram(void **program, const char *text, const char *name, int count, const char *const *texts, const char *const *names) {
  (void)text, (void)count, (void)texts, (void)names;
  *program = strdup(name);
  return *program ? 0 : 1;
}

int nvrtcDestroyProgram(void **program) {
  free(*program);
  *program = NULL;
  return 0;
}

/* The program's name starts with KERNEL or KERNEL.ENTRY, then '-'. */
int nvrtcCompileProgram(void *program, int count, const char *const *options) {
  static const char arch_option[] = "--gpu-architecture=";
  char kernel[128];
  const char *path = getenv("FAKE_NVRTC_LIST"), *arch = "";
  FILE *list = path ? fopen(path, "a") : NULL;
  if (!list) return 1;
  snprintf(kernel, sizeof kernel, "%.*s", (int)strcspn(program, "-"), (const char *)program);
  char *dot = strchr(kernel, '.'), *entry = dot ? dot + 1 : kernel;
  if (dot) *dot = '\0';
  for (int i = 0; i < count; i++)
    if (!strncmp(options[i], arch_option, sizeof arch_option - 1)) arch = options[i] + sizeof arch_option - 1;
  fprintf(list, "%s %s %s", arch, kernel, entry);
  for (int i = 0; i < count; i++)
    if (!strncmp(options[i], "-D", 2)) fprintf(list, " %s", options[i] + 2);
  fputc('\n', list);
  return fclose(list) ? 1 : 0;
}

int nvrtcGetProgramLogSize(void *program, size_t *bytes) {
  (void)program;
  *bytes = 0;
  return 0;
}

int nvrtcGetProgramLog(void *program, char *log) {
  (void)program, (void)log;
  return 0;
}

int nvrtcGetCUBINSize(void *program, size_t *bytes) {
  (void)program;
  *bytes = sizeof code;
  return 0;
}

int nvrtcGetCUBIN(void *program, char *cubin) {
  (void)program;
  memcpy(cubin, code, sizeof code);
  return 0;
}
