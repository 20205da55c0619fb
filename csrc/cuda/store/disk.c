/* disk.c: the file format and the cache folder. Every file is opened relative to a folder that was checked through its descriptor, and
 * nothing follows a symbolic link, so that nobody else can put code where this process looks for it. Two processes that write one file
 * write the same bytes under two temporary names: the later rename wins, and no reader ever sees half a file. */
#define _GNU_SOURCE
#include "disk.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "pack.h"
#include "paths.h"

enum { LARGEST_BYTES = 64 << 20, FORMAT = 2 };

typedef struct {
  char magic[8];
  uint32_t format;
  uint32_t nvrtc_version;
  uint64_t cubin_bytes;   /* once unpacked */
  uint64_t payload_bytes; /* what follows the header */
  fa_digest key, payload;
} file_header;
_Static_assert(sizeof(file_header) == 96, "the header is written as it lies in memory");

static const char magic[8] = {'F', 'A', 'C', 'U', 'B', 'I', 'N', '\n'};

static fa_digest digest_of(const void *data, size_t bytes) {
  fa_sha256 hash;
  fa_sha256_start(&hash);
  fa_sha256_feed(&hash, data, bytes);
  return fa_sha256_end(&hash);
}

static int same_digest(const fa_digest *a, const fa_digest *b) { return !memcmp(a->bytes, b->bytes, sizeof a->bytes); }

/* Where the cache is to be. Returns 0 when there is no place for it. */
static int choose_folder(char *path, char *reason, size_t reason_bytes, int *wanted) {
  const char *chosen = getenv("FLASH_ATTN_C_CACHE"), *xdg = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
  *wanted = 1;
  path[0] = '\0';
  if (chosen && !strcmp(chosen, "off")) {
    *wanted = 0;
    snprintf(reason, reason_bytes, "off (FLASH_ATTN_C_CACHE=off)");
    return 0;
  }
  int known = chosen && *chosen        ? fa_path_format(path, "%s", chosen)
              : xdg && xdg[0] == '/'   ? fa_path_format(path, "%s/flash_attn_c", xdg)
              : home && home[0] == '/' ? fa_path_format(path, "%s/.cache/flash_attn_c", home)
                                       : 0;
  if (!known) snprintf(reason, reason_bytes, "no folder for it: HOME is not set, or the path is too long; set FLASH_ATTN_C_CACHE");
  return known;
}

/* mkdir -p with 0700. What is wrong shows when the folder is opened. */
static void make_folders(const char *path) {
  char part[FA_PATH_BYTES];
  if (!fa_path_format(part, "%s", path)) return;
  for (char *slash = part + 1; (slash = strchr(slash, '/')); slash++) {
    *slash = '\0';
    mkdir(part, 0700);
    *slash = '/';
  }
  mkdir(part, 0700);
}

/* What is wrong with an open folder, NULL when nothing is. */
static const char *fault_of(int fd) {
  struct stat st;
  if (fstat(fd, &st)) return "its owner cannot be read";
  if (st.st_uid != geteuid()) return "it belongs to another user";
  if (st.st_mode & 077) return "other users may enter it (chmod 700 mends that)";
  return NULL;
}

/* What kept a folder from being opened. */
static const char *refusal_of(const char *path, int why) {
  struct stat st;
  return !lstat(path, &st) && S_ISLNK(st.st_mode) ? "it is a symbolic link" : strerror(why);
}

int fa_disk_open_cache(int make, char *path, char *reason, size_t reason_bytes, int *wanted) {
  if (!choose_folder(path, reason, reason_bytes, wanted)) return -1;
  if (make) make_folders(path);
  int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0 && errno == ENOENT && !make) {
    snprintf(reason, reason_bytes, "%.300s (not made yet)", path);
    return -1;
  }
  const char *fault = fd < 0 ? refusal_of(path, errno) : fault_of(fd);
  if (!fault) return fd;
  snprintf(reason, reason_bytes, "%.300s: %s; set FLASH_ATTN_C_CACHE to a folder of yours", path, fault);
  if (fd >= 0) close(fd);
  return -1;
}

static int read_all(int fd, void *data, size_t bytes) {
  char *p = data;
  while (bytes) {
    ssize_t n = read(fd, p, bytes);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return 0;
    p += n;
    bytes -= (size_t)n;
  }
  return 1;
}

static int write_all(int fd, const void *data, size_t bytes) {
  const char *p = data;
  while (bytes) {
    ssize_t n = write(fd, p, bytes);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return 0;
    p += n;
    bytes -= (size_t)n;
  }
  return 1;
}

static int header_fits(const file_header *header, const fa_digest *key, off_t file_bytes) {
  return !memcmp(header->magic, magic, sizeof magic) && header->format == FORMAT && same_digest(&header->key, key) &&
         header->cubin_bytes > 0 && header->cubin_bytes <= LARGEST_BYTES && header->payload_bytes > 0 &&
         header->payload_bytes <= fa_pack_bound(LARGEST_BYTES) && (off_t)(sizeof *header + header->payload_bytes) == file_bytes;
}

fa_disk_status fa_disk_read(int directory, const char *file, const fa_digest *key, int check_owner, fa_disk_kernel *kernel) {
  /* O_NONBLOCK: a pipe put there must not make this hang. */
  int fd = openat(directory, file, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return errno == ENOENT ? FA_DISK_ABSENT : FA_DISK_DAMAGED;
  struct stat st;
  file_header header;
  void *data = NULL, *cubin = NULL;
  int good = !fstat(fd, &st) && S_ISREG(st.st_mode) && (!check_owner || st.st_uid == geteuid()) && read_all(fd, &header, sizeof header) &&
             header_fits(&header, key, st.st_size) && (data = malloc(header.payload_bytes)) && read_all(fd, data, header.payload_bytes);
  if (good) {
    const fa_digest digest = digest_of(data, header.payload_bytes);
    good = same_digest(&digest, &header.payload) && (cubin = malloc(header.cubin_bytes)) &&
           fa_unpack(data, header.payload_bytes, cubin, header.cubin_bytes);
  }
  free(data);
  if (good && check_owner) futimens(fd, NULL); /* the time of last use, for fa_disk_trim */
  close(fd);
  if (!good) {
    free(cubin);
    return FA_DISK_DAMAGED;
  }
  *kernel = (fa_disk_kernel){header.key, (int)header.nvrtc_version, cubin, header.cubin_bytes};
  return FA_DISK_FOUND;
}

static int write_file(int fd, const fa_disk_kernel *kernel) {
  file_header header = {
      .format = FORMAT, .nvrtc_version = (uint32_t)kernel->nvrtc_version, .cubin_bytes = kernel->bytes, .key = kernel->key};
  void *packed = malloc(fa_pack_bound(kernel->bytes));
  header.payload_bytes = packed ? fa_pack(kernel->cubin, kernel->bytes, packed) : 0;
  if (!header.payload_bytes) {
    free(packed);
    return ENOMEM;
  }
  memcpy(header.magic, magic, sizeof magic);
  header.payload = digest_of(packed, header.payload_bytes);
  errno = EIO;
  int failure = write_all(fd, &header, sizeof header) && write_all(fd, packed, header.payload_bytes) && !fsync(fd) ? 0 : errno;
  free(packed);
  return failure;
}

int fa_disk_write(int directory, const char *file, const fa_disk_kernel *kernel) {
  static atomic_uint counter;
  char temporary[64];
  snprintf(temporary, sizeof temporary, ".%ld.%u.part", (long)getpid(), atomic_fetch_add(&counter, 1));
  int fd = openat(directory, temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
  if (fd < 0) return errno;
  int failure = write_file(fd, kernel);
  if (close(fd) && !failure) failure = errno;
  if (!failure && renameat(directory, temporary, directory, file)) failure = errno;
  if (failure) unlinkat(directory, temporary, 0);
  return failure;
}

static int has_suffix(const char *name, const char *suffix) {
  const size_t length = strlen(name), tail = strlen(suffix);
  return length >= tail && !strcmp(name + length - tail, suffix);
}

/* One pass: adds up the kernels, notes the one used longest ago, and removes what a killed process left behind. */
static int64_t survey(int directory, DIR *dir, char *oldest, size_t oldest_bytes) {
  int64_t total = 0;
  time_t oldest_time = 0;
  oldest[0] = '\0';
  rewinddir(dir);
  for (struct dirent *entry; (entry = readdir(dir));) {
    struct stat st;
    if (fstatat(directory, entry->d_name, &st, AT_SYMLINK_NOFOLLOW) || !S_ISREG(st.st_mode)) continue;
    if (has_suffix(entry->d_name, ".part") && st.st_mtime < time(NULL) - 3600) unlinkat(directory, entry->d_name, 0);
    if (!has_suffix(entry->d_name, ".cubin")) continue;
    total += st.st_size;
    if (oldest[0] && st.st_mtime >= oldest_time) continue;
    oldest_time = st.st_mtime;
    snprintf(oldest, oldest_bytes, "%s", entry->d_name);
  }
  return total;
}

void fa_disk_trim(int directory, int64_t bytes) {
  char oldest[NAME_MAX + 1];
  int fd = openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  DIR *dir = fd < 0 ? NULL : fdopendir(fd);
  if (!dir) {
    if (fd >= 0) close(fd);
    return;
  }
  while (survey(directory, dir, oldest, sizeof oldest) > bytes && oldest[0])
    if (unlinkat(directory, oldest, 0)) break;
  closedir(dir);
}
