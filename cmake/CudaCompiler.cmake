# Enables CUDA with the compiler of the nvidia-cuda-nvcc package in the build environment, or with an installed toolkit
# where QWEN_PLUGINS_SYSTEM_CUDA is ON or CUDAToolkit_ROOT is given.
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)

if(CMAKE_CUDA_COMPILER OR DEFINED CUDAToolkit_ROOT OR DEFINED ENV{CUDAToolkit_ROOT})
  set(QWEN_PLUGINS_SYSTEM_CUDA ON)
endif()

if(QWEN_PLUGINS_SYSTEM_CUDA)
  if(NOT CUDAToolkit_ROOT AND DEFINED ENV{CUDAToolkit_ROOT})
    set(CUDAToolkit_ROOT $ENV{CUDAToolkit_ROOT})
  endif()
  if(CUDAToolkit_ROOT AND NOT CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_COMPILER ${CUDAToolkit_ROOT}/bin/nvcc)
  endif()
  if(NOT CMAKE_CUDA_COMPILER)
    find_program(CMAKE_CUDA_COMPILER nvcc PATHS /usr/local/cuda/bin)
  endif()
else()
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import nvidia; print(';'.join(nvidia.__path__))"
    OUTPUT_VARIABLE nvidia_folders OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  find_path(pip_cuda_root bin/nvcc PATHS ${nvidia_folders} PATH_SUFFIXES cu13 NO_DEFAULT_PATH)
  if(NOT pip_cuda_root)
    message(FATAL_ERROR
      "No nvcc from pip in ${Python_EXECUTABLE}'s environment. `pip install .` brings it; with --no-build-isolation either "
      "install the packages that pyproject.toml lists under build.requires, or use an installed CUDA toolkit: "
      "pip install . --no-build-isolation -C cmake.define.QWEN_PLUGINS_SYSTEM_CUDA=ON")
  endif()
  set(CMAKE_CUDA_COMPILER ${pip_cuda_root}/bin/nvcc)
  set(CUDAToolkit_ROOT ${pip_cuda_root})
  # The package's nvcc.profile points to lib64, but its libraries are in lib.
  string(APPEND CMAKE_CUDA_FLAGS_INIT " -L${pip_cuda_root}/lib")
  # CMake insists on finding the shared CUDA runtime, too, which nothing links and which has no unversioned name there.
  file(GLOB CUDA_CUDART ${pip_cuda_root}/lib/libcudart.so.*)
endif()

execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE cuda_version ERROR_QUIET)
if(NOT cuda_version MATCHES "release ([0-9]+\\.[0-9]+)")
  message(FATAL_ERROR "No CUDA compiler: \"${CMAKE_CUDA_COMPILER}\" does not run. Put nvcc on PATH, or name the toolkit's "
                      "folder, which has bin/nvcc, in the environment variable CUDAToolkit_ROOT.")
endif()
set(cuda_version ${CMAKE_MATCH_1})
if(cuda_version VERSION_LESS 12.4)
  message(FATAL_ERROR "qwen-plugins needs CUDA 12.4 or newer; ${CMAKE_CUDA_COMPILER} is of ${cuda_version}")
endif()

file(REAL_PATH ${CMAKE_CUDA_COMPILER} nvcc)
get_filename_component(nvcc_root ${nvcc} DIRECTORY)
get_filename_component(nvcc_root ${nvcc_root} DIRECTORY)
find_file(cuda_host_config crt/host_config.h
  PATHS ${CUDAToolkit_ROOT} ${nvcc_root} PATH_SUFFIXES include targets/x86_64-linux/include targets/sbsa-linux/include)
if(cuda_host_config)
  check_host_compiler(${cuda_version} ${cuda_host_config})
endif()
if(NOT CMAKE_CUDA_HOST_COMPILER AND NOT DEFINED ENV{CUDAHOSTCXX})
  set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})  # the one that was checked, not the first gcc on PATH
endif()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  # Machine code for Ampere to Blackwell, or to Hopper before CUDA 12.8; the PTX of the newest lets later chips compile it
  # at load time.
  set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real 89-real)
  if(cuda_version VERSION_LESS 12.8)
    list(APPEND CMAKE_CUDA_ARCHITECTURES 90)
  else()
    list(APPEND CMAKE_CUDA_ARCHITECTURES 90-real 100-real 120)
  endif()
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
# About six times smaller than uncompressed; the driver unpacks what it loads.
if(cuda_version VERSION_LESS 12.8)
  set(compress_option -Xfatbin=-compress-all)
else()
  set(compress_option --compress-mode=size)
endif()
message(STATUS "CUDA ${CUDAToolkit_VERSION} from ${CMAKE_CUDA_COMPILER}, architectures ${CMAKE_CUDA_ARCHITECTURES}")
