// An empty abi3 module, _C or _C_cuda: importing it loads the library, whose static initialisers register the
// operators or their kernels.
#include <Python.h>

#define TEXT_(name) #name
#define TEXT(name) TEXT_(name)
#define JOINED_(prefix, name) prefix##name
#define JOINED(prefix, name) JOINED_(prefix, name)

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, TEXT(TORCH_EXTENSION_NAME), nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

#if defined(__GLIBC__)
// libstdc++ asks it whether a shared_ptr may count without atomics. Were it the C library's, the module would need
// glibc 2.32, where manylinux_2_28 promises 2.28; 0 is "there may be threads".
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
#endif

PyMODINIT_FUNC JOINED(PyInit_, TORCH_EXTENSION_NAME)() { return PyModule_Create(&module); }
