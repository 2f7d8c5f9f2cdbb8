// A small libFuzzer for compilers without one: inputs are mutated, those that reach an edge for the first time are
// kept.
//
//   driver run COUNT SEED FOLDER     so many new inputs, or for so long (240s); one that fails is written to FOLDER
//   driver replay FILE...            inputs as text: hex digits, # begins a comment
//
// Compiled with -fsanitize-coverage=trace-pc an edge is a pair of blocks that follow one another; with
// GRPO_FUZZ_FIBERS, where which fiber follows which is drawn, a block.
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using Bytes = std::vector<uint8_t>;

constexpr size_t kEdges = 1 << 16;
constexpr unsigned kHangSeconds = 60;
uint8_t seen[kEdges], reached[kEdges];
thread_local uintptr_t before = 0;
Bytes current;
std::string folder;

void save_current() {
  char path[512];
  snprintf(path, sizeof path, "%s/found-%d.txt", folder.c_str(), int(getpid()));
  if (FILE* file = fopen(path, "w")) {
    for (uint8_t byte : current) fprintf(file, "%02x", byte);
    fprintf(file, "\n");
    fclose(file);
    fprintf(stderr, "the input is in %s\n", path);
  }
}

void on_death(int number) {
  fprintf(stderr, "signal %d (%s)\n", number, strsignal(number));
  save_current();
  _exit(70);
}

bool new_edges() {
  bool found = false;
  for (size_t i = 0; i < kEdges; ++i)
    if (reached[i] && !seen[i]) seen[i] = 1, found = true;
  memset(reached, 0, sizeof reached);
  return found;
}

void mutate(Bytes& bytes, const std::vector<Bytes>& kept, std::mt19937_64& random) {
  for (int i = 1 + int(random() % 5); i > 0; --i) {
    const size_t at = bytes.empty() ? 0 : random() % bytes.size();
    switch (bytes.empty() ? 4 : random() % 6) {
      case 0: bytes[at] = uint8_t(random()); break;
      case 1: bytes[at] ^= uint8_t(1 << random() % 8); break;
      case 2: bytes[at] = uint8_t(bytes[at] + (random() % 2 ? 1 : -1)); break;
      case 3: bytes.erase(bytes.begin() + long(at)); break;
      case 4:
        for (int more = int(random() % 64); more >= 0; --more) bytes.push_back(uint8_t(random()));
        break;
      default: {  // the end of another
        const Bytes& other = kept[random() % kept.size()];
        bytes.resize(at);
        if (at < other.size()) bytes.insert(bytes.end(), other.begin() + long(at), other.end());
      }
    }
  }
  if (bytes.size() > 512) bytes.resize(512);
}

int run(const char* how_many, uint64_t seed) {
  const bool timed = strchr(how_many, 's') != nullptr;
  const double most = atof(how_many);
  fprintf(stderr, "seed %llu\n", (unsigned long long)seed);
  std::mt19937_64 random(seed);
  std::vector<Bytes> kept{Bytes()};
  const time_t began = time(nullptr);
  uint64_t executions = 0;
  while ((timed ? difftime(time(nullptr), began) : double(executions)) < most) {
    current = random() % 8 ? kept[random() % kept.size()] : Bytes();
    mutate(current, kept, random);
    alarm(kHangSeconds);
    LLVMFuzzerTestOneInput(current.data(), current.size());
    ++executions;
    if (new_edges()) kept.push_back(current);
  }
  alarm(0);
  size_t edges = 0;
  for (uint8_t edge : seen) edges += edge;
  printf("%llu executions, %zu inputs kept, %zu edges\n", (unsigned long long)executions, kept.size() - 1, edges);
  return 0;
}

int replay(const char* path) {
  FILE* file = fopen(path, "r");
  if (!file) return 1;
  current.clear();
  char line[4096];
  while (fgets(line, sizeof line, file)) {
    unsigned byte;
    if (line[0] == '#') continue;
    for (const char* at = line; sscanf(at, "%2x", &byte) == 1; at += 2) current.push_back(uint8_t(byte));
  }
  fclose(file);
  alarm(kHangSeconds);
  LLVMFuzzerTestOneInput(current.data(), current.size());
  printf("%s: %zu bytes\n", path, current.size());
  return 0;
}

}  // namespace

// Of one thread at a time it is an edge; of several no more than a hint.
extern "C" void __sanitizer_cov_trace_pc() {
  const uintptr_t here = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  reached[((here >> 1) ^ before) * 0x9e3779b97f4a7c15u >> 48] = 1;
#ifndef GRPO_FUZZ_FIBERS
  before = here;
#endif
}

extern "C" void __asan_on_error() { save_current(); }

int main(int count, char** arguments) {
  for (int number : {SIGSEGV, SIGBUS, SIGFPE, SIGABRT, SIGALRM, SIGILL, SIGTRAP}) signal(number, on_death);
  if (count == 5 && !strcmp(arguments[1], "run")) {
    folder = arguments[4];
    return run(arguments[2], strtoull(arguments[3], nullptr, 10));
  }
  folder = ".";
  int status = count < 3 || strcmp(arguments[1], "replay");
  for (int i = 2; !status && i < count; ++i) status = replay(arguments[i]);
  return status;
}
